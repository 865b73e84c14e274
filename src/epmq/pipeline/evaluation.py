"""Score a checkpoint, or the experts that it was made of, on the data of a recipe."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from epmq.data.examples import Examples
from epmq.errors import InputError
from epmq.merging.compatibility import open_experts
from epmq.merging.experts import ExpertSet
from epmq.models.blocks import use_fast_matmul
from epmq.models.multitask import MultiTaskModel, load
from epmq.pipeline.inputs import ModelInputs
from epmq.pipeline.metrics import metrics_of, scorer_of
from epmq.pipeline.prepare import ExpertData, check_head
from epmq.pipeline.processor import output_processor
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe
from epmq.reporting.scores import score_report
from epmq.runtime import progress_bars, select_device


def evaluate_model(
    model: MultiTaskModel, evaluation: dict[str, Examples], recipe: Recipe, bar: Progress
) -> dict[str, float]:
    """The score of every task, in its metric (`epmq.pipeline.metrics.METRICS`). The model's layers are sped up."""
    use_fast_matmul(model)
    row = bar.add_task("evaluate", total=sum(map(len, evaluation.values())))
    size, length, advance = recipe.batch_size, recipe.max_length, partial(bar.advance, row)
    return {
        task: scorer_of(examples)(model, task, examples, batch_size=size, max_length=length, advance=advance)
        for task, examples in evaluation.items()
    }


def evaluate_checkpoint(
    path: str | Path, recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True
) -> dict[str, Any]:
    """Score a checkpoint on every task of a recipe that has evaluation data.

    Args:
        path: a checkpoint that epmq wrote.
        recipe: names the evaluation data.

    Returns:
        `metric`, `scores` by task and `mean_score`, as in a report.

    Raises:
        InputError: the recipe has no evaluation data.
        UnknownTaskError: the checkpoint has no head for a task.
    """
    recipe = load_recipe(recipe)
    _, evaluation, _ = _open(recipe)
    with progress_bars(progress) as bar:
        scores = evaluate_model(load(path, select_device(recipe.device)), evaluation, recipe, bar)
    return score_report(metrics_of(evaluation), scores)


def evaluate_experts(
    recipe: str | Path | dict[str, Any] | Recipe, *, base: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Score each expert on its own task: what one model for all tasks is measured against.

    Args:
        recipe: names experts and evaluation data.
        base: measure the base model under each expert's head instead.

    Returns:
        as `evaluate_checkpoint`.
    """
    recipe = load_recipe(recipe)
    experts, evaluation, processor = _open(recipe)
    scores: dict[str, float] = {}
    with progress_bars(progress) as bar:
        for task, examples in evaluation.items():
            expert = experts.experts[task]
            backbone = experts.whole_model(experts.base if base else expert, select_device(recipe.device))
            head = expert.head(backbone)
            model = MultiTaskModel(backbone, {} if head is None else {task: head}, processor)
            scores |= evaluate_model(model, {task: examples}, recipe, bar)
    return score_report(metrics_of(evaluation), scores)


def _open(recipe: Recipe) -> tuple[ExpertSet, dict[str, Examples], Any]:
    """The experts, the evaluation data of those that have any, in the recipe's order, and the processor of all."""
    if all(expert.evaluation is None for expert in recipe.experts):
        raise InputError("recipe: no expert has evaluation data")
    experts = open_experts(recipe.base, recipe.experts, recipe.tokenizer, recipe.config)
    plan = output_processor(experts)
    inputs, evaluation = ModelInputs(experts, recipe, plan.processor), {}
    for expert in recipe.experts:
        if expert.evaluation is not None:
            data = ExpertData(experts, recipe, expert, inputs, plan.templates.get(expert.name))
            evaluation[expert.name] = data.evaluation(None)
            check_head(experts, expert.name, evaluation[expert.name])
    return experts, evaluation, plan.processor
