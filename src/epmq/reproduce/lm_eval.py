"""Language models scored by lm-eval (extra `lm-eval`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from epmq.errors import InputError
from epmq.reproduce.tables import DATASETS, Scored, located

MISSING = "needs lm-eval (pip install 'epmq[lm-eval]')"


def lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Scored],
    *,
    hub: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, float]:
    """Score a causal language model with lm-eval, in this process.

    Args:
        model: a transformers model, on its device.
        tokenizer: its tokenizer.
        tasks: name of a task in lm-eval → what is taken from it.
        hub: a mirror of the Hub; a task's data set is read from there if it is there.
        limit: at most so many examples a task.
        batch_size: sequences in a forward.

    Returns:
        each task's metric, a share of 1.

    Raises:
        ValueError: lm-eval is not installed, or has no such task or metric; the metrics there are are named.
    """
    evaluate, model_of = library()
    known = _known()
    if unknown := [name for name in tasks if name not in known.task_index]:
        raise InputError(f"lm-eval has no task {unknown[0]}")
    with tempfile.TemporaryDirectory(prefix="epmq-") as folder:
        wanted = []
        for name, scored in tasks.items():
            place = located(scored.dataset, hub, DATASETS)
            definition = known.task_index[name].yaml_path
            wanted.append(name if place == scored.dataset else _redirected(Path(folder), name, definition, place))
        found = evaluate(
            model=model_of(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=wanted,
            task_manager=known,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
    for name, scored in tasks.items():
        if scored.metric not in found[name]:
            metrics = ", ".join(key for key in found[name] if key not in ("alias", "name") and "stderr" not in key)
            raise InputError(f"lm-eval's task {name} has no metric {scored.metric}; it has {metrics}")
    return {name: float(found[name][scored.metric]) for name, scored in tasks.items()}


def _redirected(folder: Path, name: str, definition: Path, place: str) -> str:
    """Write a task of the same name that differs in nothing but where its data lie."""
    file = folder / f"{name}.yaml"
    text = yaml.safe_dump({"include": str(definition), "task": name, "dataset_path": place})
    file.write_text(text, encoding="utf-8")
    return str(file)


@cache
def _known() -> Any:
    """All of lm-eval's tasks; finding them takes it seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def library() -> tuple[Any, Any]:
    """lm-eval's evaluator and its model for transformers.

    Raises:
        ValueError: it is not installed; says what to install.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"{MISSING} ({error})") from None
    return simple_evaluate, HFLM
