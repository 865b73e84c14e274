"""Calibration examples in two parts: those that are trained on, step by step, and those that decide what is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError

# Of so many examples one is held out.
SHARE = 8
# Tokens, padding among them, of a step: with more of them, memory grows, and few steps are left.
MOST_TOKENS = 4096

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """What a model says to some examples.

    Attributes:
        features: [rows, features], what a head's last linear map or an output layer receives; None where that is not
            known. A row is an example, or a real token of one.
        scores: [rows, classes]; None where there are none, or far too many.
    """

    features: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class OutputLayer:
    """From last hidden states to next-token scores: scale · cap · tanh(W h + b over cap), as a model's own code does.

    Attributes:
        product: W h + b, of [tokens, hidden].
        scale, cap: 1 and None where nothing follows on the product.
    """

    product: Callable[[Tensor], Tensor]
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        scores = self.product(hidden) * self.scale if self.scale != 1 else self.product(hidden)
        return scores if self.cap is None else self.cap * (scores / self.cap).tanh()


@dataclass(frozen=True)
class Piece:
    """Some examples of a task: the model's inputs, and what reads what the expert has said to them."""

    inputs: dict[str, Any]
    taught: Callable[[], Said]


@dataclass(frozen=True)
class TaskPieces:
    """The examples of one task.

    Attributes:
        train, held_out: those that are trained on, step by step, and those that decide what is kept.
        weight: of the task, over the mean weight.
        spread: variance of the expert's scores.
        teacher: its output layer, where it is a language model without a head.
    """

    train: Sequence[Piece]
    held_out: Sequence[Piece]
    weight: float = 1.0
    spread: float = 1.0
    teacher: OutputLayer | None = None


def hold_out(batches: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Every eighth example apart, and at least one; of the others, no more in a batch than `MOST_TOKENS` allows.

    A batch that cannot be cut, since its tensors differ in their first dimension, counts as one example.

    Returns:
        what is trained on, and what is held out.

    Raises:
        InputError: there is but one example.
    """
    sizes = [_examples(batch) or 1 for batch in batches]
    total = sum(sizes)
    if total < 2:
        raise InputError("quantize.refine: needs two examples at least, one of them to decide what is kept")
    train, held, start = list[Inputs](), list[Inputs](), 0
    for batch, size in zip(batches, sizes):
        numbers = torch.arange(start, start + size)
        apart = (numbers % SHARE == SHARE - 1) | (numbers == total - 1 if total < SHARE else torch.zeros(()).bool())
        start += size
        for part, pieces in ((~apart, train), (apart, held)):
            if bool(part.any()):
                pieces += _cut(batch, part.nonzero().flatten())
    return train, held


def _examples(batch: Inputs) -> int | None:
    """How many examples a batch has; None where that cannot be told."""
    sizes = {len(value) if isinstance(value, Tensor) and value.ndim else 0 for value in batch.values()}
    return sizes.pop() or None if len(sizes) == 1 else None


def _cut(batch: Inputs, chosen: Tensor) -> list[Inputs]:
    """Some examples of a batch, in as many batches as it takes."""
    size = _examples(batch)
    if size is None:
        return [batch]
    texts = [value for value in batch.values() if value.ndim == 2 and not value.is_floating_point()]
    tokens = max((value.shape[1] for value in texts), default=1)
    return [
        {name: value[rows.to(value.device)] for name, value in batch.items()}
        for rows in chosen.split(max(1, MOST_TOKENS // max(1, tokens)))
    ]
