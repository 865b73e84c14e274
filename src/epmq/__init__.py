"""epmq: merge fine-tuned experts and quantize the merge with the experts as the guide.

    import epmq

    report = epmq.run("recipe.yaml")        # merge, quantize, evaluate, write
    model = epmq.load(report["output"])     # one model for all tasks
    model.answer("spam", ["You have won a prize"])

Names are imported when they are first used, so that `import epmq` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epmq.models.multitask import MultiTaskModel, load
    from epmq.pipeline.bench import bench
    from epmq.pipeline.cost import dry_run
    from epmq.pipeline.evaluation import evaluate_checkpoint, evaluate_experts
    from epmq.pipeline.exporting import export_checkpoint
    from epmq.pipeline.paging import page_checkpoint
    from epmq.pipeline.run import merge, run
    from epmq.recipe import Recipe
    from epmq.recipe_file import load_recipe

__version__ = "0.1.0"
__all__ = [
    "MultiTaskModel",
    "Recipe",
    "bench",
    "dry_run",
    "evaluate_checkpoint",
    "evaluate_experts",
    "export_checkpoint",
    "load",
    "load_recipe",
    "merge",
    "page_checkpoint",
    "run",
]

_HOME = {
    "MultiTaskModel": "epmq.models.multitask",
    "Recipe": "epmq.recipe",
    "bench": "epmq.pipeline.bench",
    "dry_run": "epmq.pipeline.cost",
    "evaluate_checkpoint": "epmq.pipeline.evaluation",
    "evaluate_experts": "epmq.pipeline.evaluation",
    "export_checkpoint": "epmq.pipeline.exporting",
    "load": "epmq.models.multitask",
    "load_recipe": "epmq.recipe_file",
    "merge": "epmq.pipeline.run",
    "page_checkpoint": "epmq.pipeline.paging",
    "run": "epmq.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epmq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
