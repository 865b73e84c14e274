"""The loop: walk the merged model block by block, collect moments, solve, write the quantized layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import InputGroup, Stack, as_matrix, block_linears, find_stacks, hooks, input_groups, linears
from epmq.grid import QuantizedTensor
from epmq.moments import Moments
from epmq.objective import Objective
from epmq.skeleton import drop_tensors, load_block, load_embeddings, set_tensor
from epmq.solvers import gptq, hessian_loss, rtn, search_scales
from epmq.sources import Sources
from epmq.streams import Calibration, ExpertStream, expert_streams
from epmq.walk import Step, Walk

Emit = Callable[[str, Tensor], None]
EmitLayer = Callable[[str, nn.Module, QuantizedTensor], None]


@dataclass
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: in the model.
        shape: [out, in].
        group: name of the first layer that shares its input.
        loss: tr((Q − W*) H (Q − W*)ᵀ); None for round-to-nearest, which sees no data.
        merge_loss: tr((W_m − W*) H (W_m − W*)ᵀ), what the merged weight is off the target; None as above.
        strength: λ̄ over the mean Gram diagonal that was used.
        tokens: calibration tokens seen.
        seconds: of the solve, shared evenly in a group.
    """

    name: str
    shape: list[int]
    group: str
    loss: float | None = None
    merge_loss: float | None = None
    strength: float | None = None
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_grid(sources: Sources) -> None:
    """Check before any compute that the grid fits every layer that would be quantized.

    Raises:
        ValueError: a layer does not fit; it is named.
    """
    grid = sources.recipe.quantize.grid
    for name, linear in block_linears(sources.model):
        weight = as_matrix(linear, linear.weight)  # type: ignore[arg-type]
        try:
            grid.width(weight.shape[1])
        except ValueError as error:
            raise ValueError(f"quantize.group_size: {name}: {error}") from None


def read_blocks(sources: Sources, emit: Emit) -> Iterator[list[LayerReport]]:
    """Emit the merged tensors of the blocks as they are; yields an empty report a block."""
    for stack, index, _ in _blocks(sources.model):
        for name in sources.block_names(stack.block_name(index)):
            emit(name, sources.merged(name))
        yield []


def quantize_nearest(sources: Sources, emit: Emit, emit_layer: EmitLayer) -> Iterator[list[LayerReport]]:
    """Round the merged model to nearest, a block at a time, without calibration data.

    Args:
        sources: merged model and experts.
        emit: takes each tensor of a block that is not quantized, with its name.
        emit_layer: takes each quantized layer.

    Yields:
        reports of one block's layers.
    """
    for stack, index, block in _blocks(sources.model):
        prefix, reports = stack.block_name(index), []
        layers = dict(linears(block))
        for name in sources.block_names(prefix):
            local = name[len(prefix) + 1 :].removesuffix(".weight")
            if local not in layers or not name.endswith(".weight"):
                emit(name, sources.merged(name))
                continue
            weight = as_matrix(layers[local], sources.merged(name))
            start = time.perf_counter()
            settings = sources.recipe.quantize
            scales = search_scales(weight, settings.grid, weight.dtype) if settings.scales == "search" else None
            quantized = rtn(weight, settings.grid, weight.dtype, scales)
            seconds = time.perf_counter() - start
            reports.append(LayerReport(f"{prefix}.{local}", list(weight.shape), local, seconds=seconds))
            emit_layer(f"{prefix}.{local}", layers[local], quantized)
        yield reports


def quantize_calibrated(
    sources: Sources,
    calibration: Sequence[Calibration],
    emit: Emit,
    emit_layer: EmitLayer,
    device: torch.device,
    keep: bool = False,
) -> Iterator[list[LayerReport]]:
    """Quantize with `gptq` or `expert_guided`, a block at a time.

    Every block sees the inputs that the quantized blocks before it produce.

    Args:
        sources: merged model and experts; parameters outside the blocks must be loaded (`load_outside`).
        calibration: batches of every task, in the order of the recipe's experts.
        emit, emit_layer: as in `quantize_nearest`.
        device: where blocks and moments live.
        keep: leave the quantized weights in `sources.model`; otherwise a block is freed when it is done.

    Yields:
        reports of one block's layers.

    Raises:
        ValueError: a layer saw no data or not finite data, or its Hessian cannot be factored; it is named.
    """
    streams = expert_streams(sources, calibration, device)
    batches = [batch for part in calibration for batch in part.batches]
    for step in Walk(sources.model, batches):
        load_block(sources.model, sources.block_names(step.name), sources.merged, device)
        with _naming(step.name):
            groups = input_groups(step.block, lambda step=step: step.run(0))  # type: ignore[misc]
        layers = [LayerGroup(sources, step, group) for group in groups]
        _gather(sources, step, layers, calibration, streams)
        reports: list[LayerReport] = []
        while layers:  # each is freed when it is done
            group = layers.pop(0)
            with _naming(f"{step.name}.{group.names[0]}"):
                reports += _solve(sources, step, group, emit_layer)
        del group
        quantized = {f"{report.name}.weight" for report in reports}
        for name, tensor in step.block.state_dict(prefix=f"{step.name}.").items():
            if name in sources.names and name not in quantized:
                emit(name, tensor.to(sources.stored_dtype(name) or tensor.dtype))
        step.finish()
        if not keep:
            drop_tensors(step.block)
        yield reports


def load_outside(sources: Sources, emit: Emit, device: torch.device) -> None:
    """Merge the tensors that lie outside the blocks (embeddings, norms, heads) into the skeleton, and emit them.

    Embeddings and the output layer keep the dtype on disk, and so share their memory with what is emitted.
    """

    def read(name: str) -> Tensor:
        tensor = sources.merged(name)
        emit(name, tensor)
        return tensor

    rest = load_embeddings(sources.model, sources.outside_names(), read, device)
    load_block(sources.model, rest, read, device)
    sources.tie(sources.model)


class LayerGroup:
    """The layers of a block that share an input, stacked, with what calibration gathers for them.

    Attributes:
        names: of the layers, within the block.
        modules: the layers.
        rows: their output sizes.
        calls: how often each is called in one forward of the block.
        merged: their merged weights, stacked, [out, in] float32.
        objective: collected task by task; its anchor is the merged weight, or further along the task vector.
        tokens: calibration tokens seen.
    """

    def __init__(self, sources: Sources, step: Step, group: InputGroup) -> None:
        layers = dict(linears(step.block))
        self.names, self.calls = group.names, group.calls
        self.modules = [layers[name] for name in group.names]
        weights = [as_matrix(module, module.weight.detach()) for module in self.modules]  # type: ignore[operator]
        self.rows = [len(weight) for weight in weights]
        self.dtype = sources.stored_dtype(f"{step.name}.{group.names[0]}.weight") or torch.float32
        self.merged = torch.cat(weights).float()
        self.objective = Objective(self._anchor(sources, step.name))
        self.tokens = 0

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


class _Enough(Exception):
    """All layers have seen their input: the rest of the block need not run."""


def _gather(
    sources: Sources,
    step: Step,
    groups: list[LayerGroup],
    calibration: Sequence[Calibration],
    streams: dict[str, ExpertStream],
) -> None:
    """Collect the objectives of a block, one task at a time, so that one task's moments exist at any time."""
    guided, features, batch = sources.recipe.quantize.guided, sources.recipe.quantize.expert_features or 0.0, 0
    for part in calibration:
        moments = [Moments(group.objective.anchor.shape[1], group.objective.anchor.device) for group in groups]
        stream = streams.get(part.task)
        if stream is not None:
            stream.enter(step.name, [group.names[0] for group in groups])
        taps = [Tap(step, group, m, stream) for group, m in zip(groups, moments)]
        with hooks([(tap.module, tap) for tap in taps] + [(groups[-1].modules[0], _stopper(groups[-1].calls))]):
            for own in range(len(part.batches)):
                if stream is not None:
                    stream.run(own)
                with suppress(_Enough):
                    step.run(batch)
                batch += 1
        if stream is not None:
            stream.leave()
        for group, m in zip(groups, moments):
            expert = group.expert(sources, step.name, part.task) if guided else None
            shift = group.shift(sources, step.name, part.task) if guided else None
            with _naming(f"{step.name}.{group.names[0]}, task {part.task}"):
                group.objective.add(m, sources.recipe.task_weight(part.task), expert, shift, features)
            group.tokens += m.count


class Tap:
    """A hook that adds a layer's inputs to its moments, beside the expert's own inputs if there is a stream."""

    def __init__(self, step: Step, group: LayerGroup, moments: Moments, stream: ExpertStream | None) -> None:
        self.module, self.name = group.modules[0], group.names[0]
        self.step, self.moments, self.stream = step, moments, stream

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        expert = None if self.stream is None else self.stream.inputs[self.name].pop(0)
        self.moments.add(args[0], self.step.mask(args[0]), expert)


def _solve(sources: Sources, step: Step, group: LayerGroup, emit_layer: EmitLayer) -> list[LayerReport]:
    """Quantize the layers of one input group together and put the result into the live block."""
    settings, objective = sources.recipe.quantize, group.objective
    start = time.perf_counter()
    target, hessian, strength = objective.solve(settings.strength)
    solved, loss = gptq(
        target,
        hessian,
        settings.grid,
        act_order=settings.act_order,
        search=settings.scales == "search",
        scale_dtype=group.dtype,
    )
    merge_loss = hessian_loss(group.merged - target, hessian)
    seconds = (time.perf_counter() - start) / len(group.names)
    reports = []
    parts = zip(
        group.names, group.modules, solved.split(group.rows), loss.split(group.rows), merge_loss.split(group.rows)
    )
    for name, module, quantized, lost, off in parts:
        full, shape = f"{step.name}.{name}", list(quantized.codes.shape)
        set_tensor(step.block, f"{name}.weight", as_matrix(module, quantized.dequantize().float()))
        emit_layer(full, module, quantized)
        losses = float(lost.sum()), float(off.sum())
        reports.append(LayerReport(full, shape, group.names[0], *losses, strength, group.tokens, seconds))
    return reports


def _stopper(calls: int) -> Callable[..., None]:
    """A hook that ends the block's forward when the last layer of interest has been called for the last time."""
    seen = 0

    def stop(module: nn.Module, args: tuple) -> None:
        nonlocal seen
        seen += 1
        if seen % calls == 0:
            raise _Enough

    return stop


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Put the layer's name in front of an error's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _blocks(model: nn.Module) -> Iterator[tuple[Stack, int, nn.Module]]:
    for stack in find_stacks(model):
        for index, block in enumerate(stack.blocks):
            yield stack, index, block
