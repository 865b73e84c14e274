"""Let each task's head follow the shared model.

A head was trained on its expert's features; the shared model's differ from them. Heads belong to one task each, so
they can be moved at no cost: the last linear map of a head is fitted, by ridge regression towards the weights it has,
so that on the shared model's features it gives the scores that the expert gives on its own. No label is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from epmq.calibration.sequential import Batch
from epmq.calibration.teacher import Calibration, Teacher
from epmq.merging.experts import Sources
from epmq.models.heads import Head
from epmq.models.multitask import NativeHead

# Candidates for the ridge, over the mean of the features' Gram diagonal.
STRENGTHS = tuple(10 ** (power / 2) for power in range(-6, 5))


@dataclass(frozen=True)
class Fit:
    """A head's last linear map, fitted.

    Attributes:
        weight: [classes, features] float32.
        bias: [classes] float32, or None where the head has none.
        strength: the ridge that was chosen, over the mean Gram diagonal.
        before, after: mean squared error of the scores, as they are and left out one by one when fitted.
    """

    weight: Tensor
    bias: Tensor | None
    strength: float
    before: float
    after: float

    def moved(self, head: Head) -> Head:
        """A head with this map in place of its own."""
        return replace(head, weight=self.weight.cpu(), bias=head.bias if self.bias is None else self.bias.cpu())


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK rounds otherwise with another number of threads; what it gives must not depend on that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit(features: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Fit:
    """Fit a linear map that gives the wanted scores, near the one there is.

    The ridge is the one with the least error on examples that are left out one by one, which has a closed form:
    r_i / (1 − h_i) with the residual r_i and the leverage h_i (Allen 1974, PRESS).

    Args:
        features: of the shared model, [examples, features].
        scores: what the expert gives, [examples, classes].
        weight, bias: the map there is, [classes, features] and [classes] or None.
    """
    rows, left = features.double(), scores.double() - nn.functional.linear(features, weight, bias).double()
    if bias is not None:  # a constant feature of the usual size
        size = rows.square().mean().sqrt()
        rows = torch.cat([rows, size.expand(len(rows), 1)], dim=1)
    with one_thread():
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    turned = rows @ vectors
    wanted = left.T @ turned / len(rows)

    def error(strength: float) -> tuple[float, Tensor]:
        inverse = 1 / (values.clamp(min=0) + strength * values.mean())
        leverage = (turned.square() * inverse).sum(1) / len(rows)
        move = wanted * inverse
        rest = (left - turned @ move.T) / (1 - leverage).clamp(min=1e-6)[:, None]
        return float(rest.square().mean()), move

    (after, move), strength = min(((error(strength), strength) for strength in STRENGTHS), key=lambda item: item[0][0])
    before = float(left.square().mean())
    if not after < before:
        return Fit(weight.float(), None if bias is None else bias.float(), float("inf"), before, before)
    found = (move @ vectors.T).float()
    if bias is None:
        return Fit(weight.float() + found, None, strength, before, after)
    return Fit(weight.float() + found[:, :-1], bias.float() + float(size) * found[:, -1], strength, before, after)


class HeadRefitter:
    """The heads of all tasks on the shared model, while it is walked.

    Args:
        sources: whose model is walked.
        calibration: batches of every task, in the order of the walk.
        streams: the experts; a task without a stream keeps its head.
    """

    def __init__(self, sources: Sources, calibration: Sequence[Calibration], streams: dict[str, Teacher]) -> None:
        self._sources, self._streams = sources, streams
        self._batches = [(part, batch) for part in calibration for batch in part.batches]
        self._heads: dict[str, Head | NativeHead | None] = {}
        self._features: dict[str, list[Tensor]] = {}

    def conclude(self, index: int) -> None:
        """Note what the head of a batch's task receives; see `epmq.calibration.sequential.SequentialCalibrator`."""
        part, batch = self._batches[index]
        if part.task not in self._streams:
            return
        if part.task not in self._heads:
            self._heads[part.task] = part.head(self._sources.model)
        head = self._heads[part.task]
        features = None if head is None else scored_features(self._sources.model, head, batch)
        if features is not None:
            self._features.setdefault(part.task, []).append(features)
        elif head is not None:
            self._heads[part.task] = None
            self._sources.notes.append(f"the head of {part.task} stays as it is: it does not end in a linear layer")

    def fits(self) -> Iterator[tuple[str, Head | NativeHead, Fit]]:
        """Task, head as it was and fit, for every task whose head can follow."""
        for task, features in self._features.items():
            head = self._heads[task]
            if head is not None:
                yield task, head, fit(torch.cat(features), self._streams[task].scores(), *linear_map(head))


def scored_features(backbone: nn.Module, head: Head | NativeHead, batch: Batch) -> Tensor | None:
    """What a head's last linear map receives [examples, features]; None if the scores are not its output."""
    if isinstance(head, Head):
        return head.read(backbone(**batch), batch.get("attention_mask"))
    layer, seen = head.scoring, list[tuple[Tensor, Tensor]]()
    if layer is None:
        return None
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        scores = head(**batch)
    finally:
        handle.remove()
    return seen[0][0] if len(seen) == 1 and scores.ndim == 2 and torch.equal(seen[0][1], scores) else None


def linear_map(head: Head | NativeHead) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head's last linear map."""
    layer = head if isinstance(head, Head) else head.scoring
    assert layer is not None
    return layer.weight, layer.bias
