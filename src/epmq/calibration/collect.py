"""What is collected for the layers of a block: their inputs' moments, beside what the experts have in their place."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from epmq.calibration.context import CalibrationContext
from epmq.calibration.grouping import LayerTarget
from epmq.calibration.outside import OutsideStep
from epmq.calibration.residual import ResidualAdd
from epmq.calibration.sequential import BlockStep
from epmq.calibration.teacher import Teacher
from epmq.errors import error_context
from epmq.merging.readers import BaseReader, ExpertReader, rows_of
from epmq.models.blocks import as_matrix
from epmq.models.hooks import HookPoint, watch
from epmq.models.storage import join
from epmq.quantization.factor import Factor
from epmq.quantization.hessian import Moments
from epmq.quantization.objective import Objective
from epmq.quantization.stacked import Part

if TYPE_CHECKING:
    from epmq.calibration.tiles import TiledLayer

# Tokens smaller than this share of the batch's median count as if they were as large.
SMALLEST = 0.01


@dataclass(frozen=True)
class Problem:
    """The pair (W*, H) of layers that share an input: see `epmq.quantization.objective`."""

    target: Tensor  # W* [out, in] float32, of all layers
    ridge: float | None  # λ̄ over the mean Gram diagonal that was used; None where the target is the merged weight
    factor: Factor
    damping: float  # the same for the H in which codes are chosen
    hessian: Tensor  # that H [in, in] float32


class LayerGroup:
    """The layers of a block that share an input, stacked, with what is collected for them.

    `part` are some rows of a single layer, which is all there is of it here.

    Attributes:
        names, layers, modules, rows: the layers, by their names within the block and in the model, and their output
            sizes.
        features: α, the share of the expert's own inputs in the targets.
        parts: their rows, with the grids that they are to lie on.
        target: how they are called, and what they aim at.
        merged: their merged weights, stacked, [out, in] float32.
        objective: collected task by task; its anchor is the merged weight, or further along the task vector.
        tokens: calibration tokens seen.
        pooled: those of them that are other experts'.
        largest: the largest input there was, where the weights are stored in float16, which may not hold it.
    """

    def __init__(
        self,
        context: CalibrationContext,
        step: BlockStep | OutsideStep,
        target: LayerTarget,
        part: slice | None = None,
    ) -> None:
        self._context, self._part = context, part
        self.target, self.names = target, target.names
        self.layers = [join(step.name, name) for name in target.names]
        self.features = context.features(self.layers)
        self.modules = [step.block.get_submodule(name) for name in target.names]
        weights = [rows_of(module.get_parameter("weight").detach(), part) for module in self.modules]
        self.merged = self._stack(weights).float()
        self.columns, self.device = self.merged.shape[1], self.merged.device
        self.rows = [as_matrix(module, weight).shape[0] for module, weight in zip(self.modules, weights)]
        self.dtype = context.experts.base.dtype(f"{self.layers[0]}.weight") or torch.float32
        stored = zip(self.rows, (context.layout.of[f"{layer}.weight"] for layer in self.layers))
        self.parts = [Part(rows, one.grid, one.dtype or self.dtype, one.scale or self.dtype) for rows, one in stored]
        self.objective = Objective(self._anchor())
        self.tokens, self.largest, self.pooled = 0, 0.0, 0

    def _anchor(self) -> Tensor:
        scale = self._context.guidance.anchor_scale
        if scale == 1:
            return self.merged
        base = self._weights(self._context.experts.base).to(self.merged)
        return base + scale * (self.merged - base)

    def _stack(self, weights: Iterable[Tensor]) -> Tensor:
        return torch.cat([as_matrix(module, weight) for module, weight in zip(self.modules, weights)])

    def _weights(self, reader: BaseReader | ExpertReader) -> Tensor:
        return self._stack(reader.tensor(f"{layer}.weight", self._part) for layer in self.layers)

    def tiles(self) -> "Iterator[LayerGroup]":
        """The layers in parts that are solved by themselves: here all of them."""
        yield self

    def problem(self) -> Problem:
        """What is to be solved, from all that was collected."""
        settings, guidance = self._context.settings, self._context.guidance
        target, ridge = self.merged, None
        if guidance.ridge is not None:
            target, ridge = self.objective.target(guidance.ridge, settings.act_order)
        factor, damping = self.objective.factor(guidance.damping or ridge or 0.0, settings.act_order)
        return Problem(target, ridge, factor, damping, self.objective.damped(damping))

    def add_task(self, task: str, moments: Moments, aims: bool, share: float = 1.0) -> None:
        """Fold one task's moments into the objective; where the layers aim at a sum, they hold the targets.

        `share` is that of the task's tokens that the layers see.
        """
        context, weight = self._context, self._context.task_weights[task] * share
        self.tokens += moments.count
        if not context.guidance.experts:
            self.objective.add_task(moments, weight)
        elif aims:
            self.objective.add_target_task(moments, weight)
        else:
            expert = context.experts.experts[task]
            weights = self._weights(expert).to(self.merged.device)
            bias_delta = self._bias_delta(expert) if context.guidance.biases else None
            self.objective.add_task(moments, weight, weights, bias_delta, self.features)

    def _bias_delta(self, expert: ExpertReader) -> Tensor:
        """An expert's biases less those the layers keep, stacked: [out] float32; zero for layers without one."""
        deltas = []
        for layer, module, rows in zip(self.layers, self.modules, self.rows):
            bias = module.bias
            if isinstance(bias, Tensor):
                theirs = expert.tensor(f"{layer}.bias", self._part).to(bias.device)
                deltas.append(theirs.float() - rows_of(bias.detach(), self._part).float())
            else:
                deltas.append(torch.zeros(rows, device=self.merged.device))
        return torch.cat(deltas)


def collect(
    step: BlockStep | OutsideStep,
    group: "LayerGroup | TiledLayer",
    context: CalibrationContext,
    points: Iterable[HookPoint],
) -> None:
    """Collect the objective of layers that share an input, one task at a time: one task's moments exist at a time.

    At `points` the experts' own values are taken for all layers of the block; an expert runs through the block when it
    is first asked.
    """
    for task, batches in groupby(step.members, key=lambda member: member[1].task):
        moments = Moments(group.columns, group.device, context.guidance.off_diagonal)
        teacher = context.teachers.get(task)
        if teacher is not None and teacher.step is None:
            teacher.run(step.name, points)
        collector = InputCollector(step, group, moments, teacher, context.guidance.own_inputs)
        for position, batch in batches:
            collector.add_batch(position, batch.index)
            step.offload(position)
        if moments.count:
            with error_context(f"{group.layers[0]}, task {task}"):
                group.add_task(task, moments, collector.aims)


class InputCollector:
    """Adds a layer's inputs to its moments, beside what the expert has in their place.

    `aims` says whether the layer aims at a sum in the expert's residual stream; with `own_inputs` the expert's take
    the place of the layer's.
    """

    def __init__(
        self,
        step: BlockStep | OutsideStep,
        group: "LayerGroup | TiledLayer",
        moments: Moments,
        teacher: Teacher | None,
        own_inputs: bool = False,
    ) -> None:
        self._step: Any = step  # one that waits, where the target does
        self._group, self._moments, self._own_inputs = group, moments, own_inputs
        self.aims = teacher is not None and group.target.add is not None
        self._teacher = teacher if group.target.points(group.features > 0) else None
        self._theirs: list[Tensor] = []  # what the expert has on the batch, in the order of calls

    def add_batch(self, position: int, index: int) -> None:
        """Take a batch, by its position among all and its index in its task, to the layers; add their inputs."""
        step, layer, target = self._step, self._group.names[0], self._group.target
        if self._teacher is not None:
            self._theirs = self._teacher.take(index, target.add.point if self.aims and target.add else layer)
        if not target.waits:  # what later calls receive may depend on the earlier: run with the weights there are
            with watch(step.block, layer, self._add_inputs):
                step.run(position)
            return
        inputs = step.run_until(position, layer)
        if inputs is None:
            return
        if self.aims and target.add is not None:
            self._add_targets(inputs, step.kept_input(position, target.add.skip_input), target.add)
        else:
            self._add_inputs(inputs)

    def _add_inputs(self, inputs: Tensor) -> None:
        theirs = self._theirs.pop(0) if self._theirs else None
        theirs = None if theirs is None or theirs.shape != inputs.shape else theirs
        self.add(inputs, theirs, self._step.padding_mask(inputs))

    def add(self, inputs: Tensor, theirs: Tensor | None, mask: Tensor | None = None) -> None:
        """Add inputs, and what the expert has on the same tokens, to the moments; `mask` as in `Moments.add`."""
        self._track_largest(inputs)
        if self._own_inputs and theirs is not None:
            inputs, theirs = theirs, None
        drift = None if theirs is None else theirs.float() - inputs.float()
        self._moments.add(inputs, mask, drift=drift)

    def _track_largest(self, inputs: Tensor) -> None:
        """Keep the largest input; asked only of float16, as it costs a pass and a wait for the device."""
        if self._group.dtype == torch.float16:
            self._group.largest = max(self._group.largest, float(inputs.detach().abs().max()))

    @torch.no_grad()
    def _add_targets(self, inputs: Tensor, skip_input: Tensor, add: ResidualAdd) -> None:
        self._track_largest(inputs)
        theirs, bias = self._theirs.pop(0).float(), self._group.modules[0].bias
        targets = (theirs - skip_input.float()) / add.scale
        if isinstance(bias, Tensor):
            targets -= bias.float()
        # What reads the stream normalises it, so an error counts by its share of the token's size; otherwise the few
        # very large tokens of a decoder, such as the first, would decide everything.
        size = theirs.square().mean(-1, keepdim=True).sqrt()
        size = size.clamp(min=max(SMALLEST * float(size.median()), 1e-6))
        self._moments.add(inputs.float() / size, self._step.padding_mask(inputs), targets=targets / size)
