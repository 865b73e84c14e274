"""Language models scored by lm-eval (extra `lm-eval`)."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from epmq.errors import InputError
from epmq.reproduce.tables import DATASETS, LmEvalTask, locate


def lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, LmEvalTask],
    *,
    hub: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, float]:
    """Score a causal language model of transformers with lm-eval, in this process; each task's metric, a share of 1.

    Args:
        tasks: name of a task in lm-eval → what is taken from it.
        hub: a mirror of the Hub; a task's data set is read from there if it is there.
        limit: at most so many examples a task.
        batch_size: sequences in a forward.

    Raises:
        ValueError: lm-eval is not installed, or has no such task or metric; the metrics there are are named.
    """
    evaluate, model_class = load_lm_eval()
    known = _task_manager()
    if unknown := [name for name in tasks if name not in known.task_index]:
        raise InputError(f"lm-eval has no task {unknown[0]}")
    with tempfile.TemporaryDirectory(prefix="epmq-") as folder:
        definitions = [_definition(name, task.dataset, known, hub, Path(folder)) for name, task in tasks.items()]
        results = evaluate(
            model=model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=definitions,
            task_manager=known,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
    for name, task in tasks.items():
        if task.metric not in results[name]:
            metrics = ", ".join(key for key in results[name] if key not in ("alias", "name") and "stderr" not in key)
            raise InputError(f"lm-eval's task {name} has no metric {task.metric}; it has {metrics}")
    return {name: float(results[name][task.metric]) for name, task in tasks.items()}


def _definition(name: str, dataset: str, known: Any, hub: Path | None, folder: Path) -> str:
    """A task's name; where its data are in a mirror, a file in `folder` with the same task that reads them there."""
    source = locate(dataset, hub, DATASETS)
    if source == dataset:
        return name
    file = folder / f"{name}.yaml"
    content = {"include": str(known.task_index[name].yaml_path), "task": name, "dataset_path": source}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


@cache
def _task_manager() -> Any:
    """All of lm-eval's tasks; finding them takes it seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_lm_eval() -> tuple[Any, Any]:
    """lm-eval's evaluator and its model for transformers.

    Raises:
        ValueError: it is not installed; says what to install.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"needs lm-eval (pip install 'epmq[lm-eval]') ({error})") from None
    return simple_evaluate, HFLM
