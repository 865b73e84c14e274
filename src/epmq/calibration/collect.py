"""What calibration gathers for the layers of a block: their inputs' moments, beside what the experts have there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from epmq.calibration.residual import ResidualAdd
from epmq.calibration.sequential import BlockStep
from epmq.calibration.teacher import Calibration, Teacher
from epmq.errors import error_context
from epmq.merging.experts import Sources
from epmq.models.blocks import InputGroup, as_matrix, linears
from epmq.models.hooks import HookPoint, watch
from epmq.quantization.hessian import Moments
from epmq.quantization.objective import Objective

# Tokens smaller than this share of the batch's median count as if they were as large.
SMALLEST = 0.01


class LayerGroup:
    """The layers of a block that share an input, stacked, with what calibration gathers for them.

    Attributes:
        names: of the layers, within the block.
        modules: the layers.
        rows: their output sizes.
        calls: how often each is called in one forward of the block.
        sum: the sum in the residual stream that the layer writes to and whose value in the expert it aims at, if any.
        merged: their merged weights, stacked, [out, in] float32.
        objective: collected task by task; its anchor is the merged weight, or further along the task vector.
        tokens: calibration tokens seen.
        largest: the largest input there was, where the weights are stored in float16, which may not hold it.
    """

    def __init__(
        self, sources: Sources, step: BlockStep, group: InputGroup, residual_add: ResidualAdd | None = None
    ) -> None:
        layers = dict(linears(step.block))
        self.names, self.calls, self.sum = group.names, group.calls, residual_add
        self.modules = [layers[name] for name in group.names]
        weights = [as_matrix(module, module.weight.detach()) for module in self.modules]  # type: ignore[operator]
        self.rows = [len(weight) for weight in weights]
        self.dtype = sources.stored_dtype(f"{step.name}.{group.names[0]}.weight") or torch.float32
        self.merged = torch.cat(weights).float()
        self.objective = Objective(self._anchor(sources, step.name))
        self.tokens, self.largest = 0, 0.0

    def _anchor(self, sources: Sources, block: str) -> Tensor:
        scale = sources.recipe.quantize.anchor_scale
        if scale is None or scale == 1:
            return self.merged
        base = self._stack(sources.base_tensor(f"{block}.{name}.weight") for name in self.names).float()
        return base + scale * (self.merged - base)

    def _stack(self, parts: Iterable[Tensor]) -> Tensor:
        weights = [as_matrix(module, part) for module, part in zip(self.modules, parts)]
        return torch.cat(weights).to(self.merged.device)

    def expert(self, sources: Sources, block: str, task: str) -> Tensor:
        """An expert's weights of these layers, stacked: [out, in]."""
        return self._stack(sources.expert_tensor(task, f"{block}.{name}.weight") for name in self.names)

    def see(self, inputs: Tensor) -> None:
        """Keep the largest input; asked only of float16, as it costs a pass and a wait for the device."""
        if self.dtype == torch.float16:
            self.largest = max(self.largest, float(inputs.detach().abs().max()))

    def fold(self, sources: Sources, block: str, task: str, moments: Moments, stream: Teacher | None) -> None:
        """Fold one task's moments into the objective."""
        settings, weight = sources.recipe.quantize, sources.recipe.task_weight(task)
        self.tokens += moments.count
        if not settings.guided:
            self.objective.add(moments, weight)
        elif stream is not None and self.sum is not None:
            self.objective.add_outputs(moments, weight)
        else:
            expert, shift = self.expert(sources, block, task), self.shift(sources, block, task)
            self.objective.add(moments, weight, expert, shift, settings.expert_features or 0.0)

    def shift(self, sources: Sources, block: str, task: str) -> Tensor:
        """An expert's biases less those the layers keep, stacked: [out] float32; zero for layers without one."""
        parts = []
        for name, module, rows in zip(self.names, self.modules, self.rows):
            bias = module.bias
            if isinstance(bias, Tensor):
                theirs = sources.expert_tensor(task, f"{block}.{name}.bias").to(bias.device)
                parts.append(theirs.float() - bias.detach().float())
            else:
                parts.append(torch.zeros(rows, device=self.objective.anchor.device))
        return torch.cat(parts)


def place_of(names: Sequence[str], residual_add: ResidualAdd | None) -> HookPoint:
    """Where an expert's own values for a group of layers are found: at the sum they aim at, or at their input."""
    return names[0] if residual_add is None else residual_add.place


def gather(
    sources: Sources,
    step: BlockStep,
    group: LayerGroup,
    calibration: Sequence[Calibration],
    streams: dict[str, Teacher],
    places: Iterable[HookPoint],
) -> None:
    """Collect the objective of some layers that share an input, one task at a time: one task's moments exist at a time.

    Args:
        group: the layers.
        places: where the experts' own values are wanted for all layers of the block; an expert runs through the block
            when it is first asked.
    """
    batch, features = 0, sources.recipe.quantize.expert_features
    for part in calibration:
        moments = Moments(group.objective.anchor.shape[1], group.objective.anchor.device)
        stream = streams.get(part.task)
        if stream is not None and stream.step is None:
            stream.run(step.name, places)
        tap = InputCollector(step, group, moments, stream is not None)
        for own in range(len(part.batches)):
            if stream is not None and (tap.sum is not None or features):
                tap.theirs = stream.take(own, tap.place)
            tap.listen(batch)
            step.rest(batch)
            batch += 1
        with error_context(f"{step.name}.{group.names[0]}, task {part.task}"):
            group.fold(sources, step.name, part.task, moments, stream)


class InputCollector:
    """Adds a layer's inputs to its moments, beside what the expert has in their place.

    Attributes:
        place: where the expert has it.
        theirs: what the expert has there on the batch that is listened to, in the order of calls; empty without a
            stream.
    """

    def __init__(self, step: BlockStep, group: LayerGroup, moments: Moments, streamed: bool) -> None:
        self.step, self.group, self.moments = step, group, moments
        self.sum = group.sum if streamed else None
        self.place = place_of(group.names, self.sum)
        self.theirs: list[Tensor] = []

    def listen(self, batch: int) -> None:
        """Take a batch to the layers and note what they are called on."""
        layer = self.group.names[0]
        if self.group.calls > 1:  # what later calls receive depends on the earlier: run with the weights there are
            with watch(self.step.block, layer, self._inputs):
                self.step.run(batch)
            return
        inputs = self.step.reach(batch, layer)
        if inputs is not None and self.sum is None:
            self._inputs(inputs)
        elif inputs is not None:
            self._outputs(inputs, self.step.seen(batch, self.sum.rest))  # type: ignore[union-attr]

    def _inputs(self, inputs: Tensor) -> None:
        self.group.see(inputs)
        drift = self.theirs.pop(0).float() - inputs.float() if self.theirs else None
        self.moments.add(inputs, self.step.mask(inputs), drift)

    @torch.no_grad()
    def _outputs(self, inputs: Tensor, rest: Tensor) -> None:
        assert self.sum is not None
        self.group.see(inputs)
        theirs, bias = self.theirs.pop(0).float(), self.group.modules[0].bias
        wanted = (theirs - rest.float()) / self.sum.scale
        if isinstance(bias, Tensor):
            wanted -= bias.float()
        # What reads the stream normalises it, so an error counts by its share of the token's size; otherwise the few
        # very large tokens of a decoder, such as the first, would decide everything.
        size = theirs.square().mean(-1, keepdim=True).sqrt()
        size = size.clamp(min=max(SMALLEST * float(size.median()), 1e-6))
        self.moments.add(inputs.float() / size, self.step.mask(inputs), wanted / size)
