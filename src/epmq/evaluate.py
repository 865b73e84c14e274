"""How good a model is at each task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from epmq.data import Examples, encode
from epmq.multitask import MultiTaskModel, _to


@torch.no_grad()
def accuracy(
    model: MultiTaskModel,
    task: str,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> float:
    """Share of examples whose best-scored class is the label.

    Args:
        model: backbone and heads.
        task: which head.
        examples: with labels.
        batch_size, max_length: see `epmq.data.encode`.
        advance: called with the number of examples done, batch by batch.

    Raises:
        ValueError: the examples have no labels, or a label is not a class of the head.
    """
    if examples.labels is None:
        raise ValueError(f"task {task}: the evaluation data has no labels")
    # Texts of like length share a batch: less padding, same answers.
    order = np.argsort([len(x) for x in examples.inputs], kind="stable") if examples.kind == "text" else None
    examples = examples if order is None else examples.take(order)
    assert examples.labels is not None
    right, start = 0, 0
    for batch in encode(examples, model.processor, batch_size, max_length):
        scores = model(task, **_to(batch, model.device))
        labels = examples.labels[start : start + len(scores)]
        wrong = labels[(labels < 0) | (labels >= scores.shape[1])]
        if len(wrong):
            raise ValueError(f"task {task}: label {wrong[0]} but the head has {scores.shape[1]} classes")
        right += int((scores.argmax(-1).cpu().numpy() == labels).sum())
        start += len(scores)
        advance(len(scores))
    return right / len(examples)


def gap_recovered(method: float, gptq: float, experts: float) -> float | None:
    """(method − GPTQ on the merged model) / (experts − GPTQ on the merged model); None where there is no gap."""
    return None if experts == gptq else (method - gptq) / (experts - gptq)
