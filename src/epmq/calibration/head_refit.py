"""Let each task's head follow the shared model.

A head was trained on its expert's features; the shared model's differ from them. Heads belong to one task each, so
they can be moved at no cost: the last linear map of a head is fitted, by ridge regression towards the weights it has,
so that on the shared model's features it gives the scores that the expert gives on its own. No label is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from epmq.calibration.sequential import Batch
from epmq.calibration.teacher import Calibration, Teacher
from epmq.merging.experts import Sources
from epmq.models.heads import Head
from epmq.models.multitask import NativeHead
from epmq.quantization.ridge import RidgeFit, fit_ridge


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

    def fits(self) -> Iterator[tuple[str, Head | NativeHead, RidgeFit]]:
        """Task, head as it was and fit, for every task whose head can follow."""
        for task, features in self._features.items():
            head = self._heads[task]
            if head is not None:
                yield task, head, fit_ridge(torch.cat(features), self._streams[task].scores(), *linear_map(head))


def with_weights(head: Head, fit: RidgeFit) -> Head:
    """A head with the fitted map in place of its own."""
    return replace(head, weight=fit.weight.cpu(), bias=head.bias if fit.bias is None else fit.bias.cpu())


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
