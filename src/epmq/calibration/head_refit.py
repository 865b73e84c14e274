"""Let each task's head follow the shared model.

A head was trained on its expert's features; the shared model's differ from them. Heads belong to one task each, so
they can be moved at no cost: the last linear map of a head is fitted, by ridge regression towards the weights it has,
so that on the shared model's features it gives the scores that the expert gives on its own: of an example, or of every
token, whatever the head scores. No label is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.calls import StubModel, forms
from epmq.calibration.masks import real_tokens
from epmq.calibration.sequential import Batch
from epmq.calibration.teacher import MakeHead, Teacher
from epmq.errors import reason
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import guiding_head
from epmq.models.heads import Head
from epmq.models.multitask import NativeHead
from epmq.quantization.ridge import RidgeFit, fit_ridge

# Rows, evenly spread, that a head is fitted on at most.
MOST_ROWS = 1 << 15


class CannotFollow(Exception):
    """Why a head stays as it is."""


@dataclass(frozen=True)
class HeadFit:
    """A head as it was, and the fit of its last linear map."""

    head: Head | NativeHead
    fit: RidgeFit


@dataclass(frozen=True)
class ScoredRows:
    """What a head's last linear map received on a batch, where the scores are its outputs.

    Attributes:
        features: [rows, features]; a row is an example, or a real token of one.
        shape: of the scores that the head gave.
        kept: which rows of the scores these are, booleans; None if all.
    """

    features: Tensor
    shape: torch.Size
    kept: Tensor | None = None

    def of(self, scores: Tensor) -> Tensor:
        """The same rows of other scores of this shape: [rows, classes]."""
        classes = scores.numel() // (len(self.features) if self.kept is None else self.kept.numel())
        rows = scores.reshape(-1, classes)
        return rows if self.kept is None else rows[self.kept]


class HeadRefitter:
    """Collects what the heads of all tasks receive on the shared model, and fits them.

    A task without a teacher, or without what puts the expert's head on a backbone, keeps its head; so does one whose
    scores are not what its last linear map gives, which is noted.
    """

    def __init__(self, experts: ExpertSet, make_heads: Mapping[str, MakeHead], teachers: Mapping[str, Teacher]) -> None:
        self._experts, self._make_heads, self._teachers = experts, make_heads, teachers
        self._heads: dict[str, Head | NativeHead | None] = {}
        self._scored: dict[str, list[ScoredRows]] = {}

    def on_finished(self, batch: Batch) -> None:
        """Note what the head of a batch's task receives, when the model's blocks are finished."""
        task, model = batch.task, self._experts.model
        if task not in self._teachers or task not in self._make_heads:
            return
        if task not in self._heads:
            self._heads[task] = self._make_heads[task](model)
        head = self._heads[task]
        if head is not None:
            with self._staying(task):
                self._scored.setdefault(task, []).append(scored_rows(model, head, batch.inputs))

    @contextmanager
    def _staying(self, task: str) -> Iterator[None]:
        """Let a task's head stay as it is, and note why, where it cannot follow."""
        try:
            yield
        except Exception as error:  # whatever its code raises on these inputs
            self._heads[task] = None
            why = str(error) if isinstance(error, CannotFollow) else f"it cannot be run ({reason(error)})"
            self._experts.notes.depart(f"the head of {task} stays as it is: {why}")

    def fits(self) -> dict[str, HeadFit]:
        """Task → fit, for every task whose head can follow."""
        fits = {}
        for task, scored in self._scored.items():
            head = self._heads[task]
            if head is None:
                continue
            with self._staying(task):
                scores = self._teachers[task].scores()
                if [rows.shape for rows in scored] != [own.shape for own in scores]:
                    raise CannotFollow("the expert's scores are of another shape")
                targets = torch.cat([rows.of(own) for rows, own in zip(scored, scores)])
                features = torch.cat([rows.features for rows in scored])
                step, device = -(-len(features) // MOST_ROWS), features.device
                weight, bias = linear_map(head)
                bias = None if bias is None else bias.to(device)  # a head of a file is on the processor
                fit = fit_ridge(features[::step], targets[::step], weight.to(device), bias)
                fits[task] = HeadFit(head, fit)
        return fits


@torch.no_grad()
def heads_follow(
    experts: ExpertSet, calibration: Mapping[str, Sequence[dict[str, Any]]], stub: StubModel | None = None
) -> bool:
    """Whether the heads of all experts can follow a new model, as far as that is seen without weights.

    Why one cannot goes to the notes. `calibration` holds each task's inputs, batch by batch; `stub` is the model
    without weights, where it is there already.
    """
    model, follow = (stub or StubModel(experts)).model, True
    for task, expert in experts.experts.items():
        head = guiding_head(expert, experts.notes, model)
        if head is None:
            follow = False
            continue
        for inputs in forms(calibration[task]):
            try:
                scored_rows(model, head, inputs)
            except CannotFollow as error:
                follow = False
                experts.notes.depart(f"the head of {task} stays as it is: {error}")
            except Exception:  # it may be the weights' fault: the run will tell
                follow = False
    return follow


def with_weights(head: Head, fit: RidgeFit) -> Head:
    """A head with the fitted map in place of its own."""
    return replace(head, weight=fit.weight.cpu(), bias=head.bias if fit.bias is None else fit.bias.cpu())


def scored_rows(backbone: nn.Module, head: Head | NativeHead, inputs: dict[str, Any]) -> ScoredRows:
    """What a head's last linear map receives on a batch.

    Raises:
        CannotFollow: the scores are not its outputs.
    """
    if isinstance(head, Head):
        features = head.read(backbone(**inputs), inputs.get("attention_mask"))
        return ScoredRows(features, torch.Size([len(features), len(head.weight)]))
    layer, calls = head.scoring, list[tuple[Tensor, Tensor]]()
    if layer is None:
        raise CannotFollow("it has no linear layer of its own")
    with layer.register_forward_hook(lambda module, args, output: calls.append((args[0], output))):
        scores = head(**inputs)
    if len(calls) != 1:
        raise CannotFollow(f"its last linear layer is called {len(calls)} times")
    received, given = calls[0]
    if torch.equal(given.flatten(), scores.flatten()):
        kept = real_tokens(inputs, given.shape[:-1])
        kept = None if kept is None else kept.flatten()
        features = received.flatten(0, -2)
        return ScoredRows(features if kept is None else features[kept], scores.shape, kept)
    return ScoredRows(_gathered(received, given, scores), scores.shape)


def _gathered(received: Tensor, given: Tensor, scores: Tensor) -> Tensor:
    """The inputs [examples, features] of those tokens, one an example, whose outputs are the scores."""
    differ = CannotFollow("its scores are not what its last linear layer gives")
    if given.ndim != 3 or scores.shape != (len(given), given.shape[-1]):
        raise differ
    equal = (given == scores[:, None]).all(-1)
    if not equal.any(1).all():
        raise differ
    chosen = received[torch.arange(len(given), device=given.device), equal.int().argmax(1)]
    if not (received == chosen[:, None]).all(-1)[equal].all():
        raise CannotFollow("several tokens of an example have its scores")
    return chosen


def linear_map(head: Head | NativeHead) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head's last linear map."""
    layer = head if isinstance(head, Head) else head.scoring
    assert layer is not None
    return layer.weight, layer.bias
