"""The loop: walk the merged model block by block, collect moments, solve, write the quantized layers."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import InputGroup, Stack, as_matrix, block_linears, find_stacks, input_groups, linears
from epmq.grid import QuantizedTensor
from epmq.moments import Moments
from epmq.objective import Objective
from epmq.residual import Place, Sum, at, find_sums
from epmq.skeleton import drop_tensors, load_block, load_embeddings, set_tensor
from epmq.solvers import gptq, hessian_loss, rtn, search_scales
from epmq.sources import Sources
from epmq.streams import Calibration, ExpertStream, expert_streams, run_until
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
        passes = _passes(step, groups, apart=bool(streams and sources.recipe.quantize.expert_stream))
        reports: list[LayerReport] = []
        for number, planned in enumerate(passes):
            layers = [LayerGroup(sources, step, group, sum_) for group, sum_ in planned]
            _gather(sources, step, layers, calibration, streams, last=number == len(passes) - 1)
            while layers:  # each is freed when it is done
                group = layers.pop(0)
                return_freed_memory()
                with _naming(f"{step.name}.{group.names[0]}"):
                    reports += _solve(sources, step, group, emit_layer)
            del group
        for stream in streams.values():
            stream.advance()
        quantized = {f"{report.name}.weight" for report in reports}
        for name, tensor in step.block.state_dict(prefix=f"{step.name}.").items():
            if name in sources.names and name not in quantized:
                emit(name, tensor.to(sources.stored_dtype(name) or tensor.dtype))
        step.finish()
        if not keep:
            drop_tensors(step.block)
        yield reports


def return_freed_memory() -> None:
    """Ask the C library to give freed memory back to the system; glibc would keep gigabytes in holes of its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _passes(step: Step, groups: list[InputGroup], apart: bool) -> list[list[tuple[InputGroup, Sum | None]]]:
    """The block's layers by the pass in which they are gathered and solved, with the sums that they aim at.

    Where layers aim at the residual stream they go one after the other: each mends what is left when all before it
    are quantized, and a weight that is fitted to inputs that then change does harm.
    """
    if not apart:
        return [[(group, None) for group in groups]]
    alone = [group.names[0] for group in groups if len(group.names) == 1]
    sums = find_sums(step.block, alone, lambda: step.run(0))
    return [[(group, sums.get(group.names[0]))] for group in groups]


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
        sum: the sum in the residual stream that the layer writes to and whose value in the expert it aims at, if any.
        merged: their merged weights, stacked, [out, in] float32.
        objective: collected task by task; its anchor is the merged weight, or further along the task vector.
        tokens: calibration tokens seen.
    """

    def __init__(self, sources: Sources, step: Step, group: InputGroup, sum_: Sum | None = None) -> None:
        layers = dict(linears(step.block))
        self.names, self.calls, self.sum = group.names, group.calls, sum_
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

    @property
    def place(self) -> Place:
        """Where the expert's own values for these layers are found: at their sum, or at their inputs."""
        return self.names[0] if self.sum is None else self.sum.place

    def fold(self, sources: Sources, block: str, task: str, moments: Moments, streamed: bool) -> None:
        """Fold one task's moments into the objective."""
        settings, weight = sources.recipe.quantize, sources.recipe.task_weight(task)
        self.tokens += moments.count
        if not settings.guided:
            self.objective.add(moments, weight)
        elif streamed and self.sum is not None:
            self.objective.add_move(moments, weight, self.merged)
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


def _gather(
    sources: Sources,
    step: Step,
    groups: list[LayerGroup],
    calibration: Sequence[Calibration],
    streams: dict[str, ExpertStream],
    last: bool,
) -> None:
    """Collect the objectives of some layers of a block, one task at a time, so that one task's moments exist at a time.

    Args:
        groups: the layers.
        last: whether these are the block's last, so that the experts are done with it.
    """
    batch = 0
    for part in calibration:
        moments = [Moments(group.objective.anchor.shape[1], group.objective.anchor.device) for group in groups]
        stream = streams.get(part.task)
        taps = [Tap(step, group, m, stream is not None) for group, m in zip(groups, moments)]
        places = {tap.place: tap.group.calls for tap in taps}
        if stream is not None:
            stream.enter(step.name)
        with ExitStack() as stack:
            for tap in taps:
                stack.enter_context(tap.listening())
            for own in range(len(part.batches)):
                if stream is not None:
                    theirs = stream.run(own, places, last)
                    for tap in taps:
                        tap.theirs = theirs[tap.place]
                run_until(step, batch, places)
                batch += 1
        if stream is not None:
            stream.leave()
        for group, m in zip(groups, moments):
            with _naming(f"{step.name}.{group.names[0]}, task {part.task}"):
                group.fold(sources, step.name, part.task, m, stream is not None)


class Tap:
    """Adds a layer's inputs to its moments as they pass, beside what the expert has in their place.

    Attributes:
        place: where the expert has it.
        theirs: what the expert has there on the batch that runs, in the order of calls; empty without a stream.
    """

    def __init__(self, step: Step, group: LayerGroup, moments: Moments, streamed: bool) -> None:
        self.step, self.group, self.moments = step, group, moments
        self.sum = group.sum if streamed else None
        self.place = group.place if streamed else group.names[0]
        self.theirs: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for the length of a `with` block."""
        with at(self.step.block, self.group.names[0], self._input):
            if self.sum is None:
                yield
                return
            with at(self.step.block, self.sum.place, self._written):
                yield

    def _input(self, inputs: Tensor) -> None:
        if self.sum is not None:
            self._waiting = inputs
            return
        drift = self.theirs.pop(0).float() - inputs.float() if self.theirs else None
        self.moments.add(inputs, self.step.mask(inputs), drift)

    def _written(self, stream: Tensor) -> None:
        assert self.sum is not None
        move = (self.theirs.pop(0).float() - stream.float()) / self.sum.scale
        self.moments.add(self._waiting, self.step.mask(self._waiting), move)


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
