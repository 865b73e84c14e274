"""Let each task's head follow the shared model.

A head was trained on its expert's features; the shared model's differ from them. Heads belong to one task each, so
they can be moved at no cost: the last linear map of a head is fitted, by ridge regression towards the weights it has,
so that on the shared model's features it gives the scores that the expert gives on its own. No label is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.sequential import Batch
from epmq.calibration.teacher import MakeHead, Teacher
from epmq.merging.experts import ExpertSet
from epmq.models.heads import Head
from epmq.models.multitask import NativeHead
from epmq.quantization.ridge import RidgeFit, fit_ridge


@dataclass(frozen=True)
class HeadFit:
    """A head as it was, and the fit of its last linear map."""

    head: Head | NativeHead
    fit: RidgeFit


class HeadRefitter:
    """Collects what the heads of all tasks receive on the shared model, and fits them.

    A task without a teacher, or without what puts the expert's head on a backbone, keeps its head.
    """

    def __init__(self, experts: ExpertSet, make_heads: Mapping[str, MakeHead], teachers: Mapping[str, Teacher]) -> None:
        self._experts, self._make_heads, self._teachers = experts, make_heads, teachers
        self._heads: dict[str, Head | NativeHead | None] = {}
        self._features: dict[str, list[Tensor]] = {}

    def on_finished(self, batch: Batch) -> None:
        """Note what the head of a batch's task receives, when the model's blocks are finished."""
        task, model = batch.task, self._experts.model
        if task not in self._teachers or task not in self._make_heads:
            return
        if task not in self._heads:
            self._heads[task] = self._make_heads[task](model)
        head = self._heads[task]
        features = None if head is None else scored_features(model, head, batch.inputs)
        if features is not None:
            self._features.setdefault(task, []).append(features)
        elif head is not None:
            self._heads[task] = None
            self._experts.notes.depart(f"the head of {task} stays as it is: it does not end in a linear layer")

    def fits(self) -> dict[str, HeadFit]:
        """Task → fit, for every task whose head can follow."""
        fits = {}
        for task, features in self._features.items():
            head = self._heads[task]
            if head is not None:
                rows, scores = torch.cat(features), self._teachers[task].scores()
                weight, bias = linear_map(head)
                bias = None if bias is None else bias.to(rows.device)  # a head of a file is on the processor
                fits[task] = HeadFit(head, fit_ridge(rows, scores, weight.to(rows.device), bias))
        return fits


def with_weights(head: Head, fit: RidgeFit) -> Head:
    """A head with the fitted map in place of its own."""
    return replace(head, weight=fit.weight.cpu(), bias=head.bias if fit.bias is None else fit.bias.cpu())


def scored_features(backbone: nn.Module, head: Head | NativeHead, inputs: dict[str, Any]) -> Tensor | None:
    """What a head's last linear map receives [examples, features]; None if the scores are not its output."""
    if isinstance(head, Head):
        return head.read(backbone(**inputs), inputs.get("attention_mask"))
    layer, calls = head.scoring, list[tuple[Tensor, Tensor]]()
    if layer is None:
        return None
    with layer.register_forward_hook(lambda module, args, output: calls.append((args[0], output))):
        scores = head(**inputs)
    return calls[0][0] if len(calls) == 1 and scores.ndim == 2 and torch.equal(calls[0][1], scores) else None


def linear_map(head: Head | NativeHead) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head's last linear map."""
    layer = head if isinstance(head, Head) else head.scoring
    assert layer is not None
    return layer.weight, layer.bias
