"""The loop: walk the merged model block by block, collect moments, solve, write the quantized layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.collect import LayerGroup, gather, place_of
from epmq.calibration.head_refit import Fit, HeadRefitter
from epmq.calibration.offload import Offloader
from epmq.calibration.residual import ResidualAdd, find_residual_adds
from epmq.calibration.sequential import BlockStep, SequentialCalibrator
from epmq.calibration.teacher import Calibration, Teacher, make_teachers
from epmq.errors import InputError, error_context
from epmq.merging.experts import Sources
from epmq.models import meta
from epmq.models.blocks import InputGroup, Stack, as_matrix, block_linears, find_stacks, input_groups, linears
from epmq.models.heads import Head
from epmq.models.hooks import first_tensor
from epmq.models.meta import materialize, set_tensor, to_meta
from epmq.models.multitask import NativeHead
from epmq.pipeline.journal import Block, Journal
from epmq.quantization.gptq import gptq, hessian_loss, rtn, rtn_fallback, search_scales
from epmq.quantization.grid import QuantizedTensor
from epmq.quantization.objective import Objective
from epmq.recipe import Quantize
from epmq.runtime import return_freed_memory

Emit = Callable[[str, Tensor], None]
EmitLayer = Callable[[str, nn.Module, QuantizedTensor], None]
# Layers of a block that share an input, with the sum that they aim at, if any.
LayerTarget = tuple[InputGroup, ResidualAdd | None]
EmitHead = Callable[[str, Head | NativeHead, Fit], None]


@dataclass
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: in the model.
        shape: [out, in].
        group: name of the first layer that shares its input.
        loss: tr((Q − W*) H (Q − W*)ᵀ); None for round-to-nearest, which sees no data.
        merge_loss: tr((W_m − W*) H (W_m − W*)ᵀ), what the merged weight is off the target; None as above.
        strength: λ̄ over the mean Gram diagonal that was used; None where no expert has a say.
        damping: the same for the H in which codes are chosen.
        tokens: calibration tokens seen.
        seconds: of the solve, shared evenly in a group.
        aims: whether it aims at a sum in the residual stream.
        rounded: rows that are rounded to nearest after all, see `rtn_fallback`.
        largest: the largest input, where the weights are stored in float16; else 0.
    """

    name: str
    shape: list[int]
    group: str
    loss: float | None = None
    merge_loss: float | None = None
    strength: float | None = None
    damping: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    aims: bool = False
    rounded: int = 0
    largest: float = 0.0

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
            raise InputError(f"quantize.group_size: {name}: {error}") from None


def quantize_nearest(
    sources: Sources, emit: Emit, emit_layer: EmitLayer, done: Journal | None = None
) -> Iterator[list[LayerReport]]:
    """Round the merged model to nearest, a block at a time, without calibration data.

    Args:
        sources: merged model and experts.
        emit: takes each tensor of a block that is not quantized, with its name.
        emit_layer: takes each quantized layer.
        done: the first blocks, where an earlier run has finished them; nothing of them is emitted.

    Yields:
        reports of one block's layers.
    """
    for number, (stack, index, block) in enumerate(_blocks(sources.model)):
        if done is not None and number < done.found:
            yield [LayerReport(**report) for report in done[number].reports]
            continue
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
    emit_head: EmitHead = lambda task, head, fit: None,
    emit_output: Callable[[Tensor], None] = lambda output: None,
    spill: Offloader | None = None,
    done: Journal | None = None,
) -> Iterator[list[LayerReport]]:
    """Quantize with `gptq` or `expert_guided`, a block at a time.

    Every block sees the inputs that the quantized blocks before it produce.

    Args:
        sources: merged model and experts; parameters outside the blocks must be loaded (`load_outside`).
        calibration: batches of every task, in the order of the recipe's experts.
        emit, emit_layer: as in `quantize_nearest`.
        device: where blocks and moments live.
        keep: leave the quantized weights in `sources.model`; otherwise a block is freed when it is done.
        emit_head: takes each task whose head follows the model, with the head as it was and what it becomes.
        emit_output: takes what the last block gives on the first batch, [..., hidden].
        spill: takes calibration activations while they wait.
        done: as in `quantize_nearest`.

    Yields:
        reports of one block's layers.

    Raises:
        ValueError: a layer saw no data or not finite data, or its Hessian cannot be factored; it is named.
    """
    streams = make_teachers(sources, calibration, device, spill)
    with ExitStack() as stack:  # what waits in an expert's forward would never be freed
        for stream in streams.values():
            stack.callback(stream.close)
        batches = [batch for part in calibration for batch in part.batches]
        apart, aimed = bool(streams and sources.recipe.quantize.expert_stream), False
        heads = HeadRefitter(sources, calibration, streams) if sources.recipe.quantize.adapt_heads else None
        walk = SequentialCalibrator(sources.model, batches, heads.conclude if heads else None, spill, shown=1)
        for number, step in enumerate(walk):
            if done is not None and number < done.found:
                reports = _repeat(sources, step, done[number], streams, device, keep)
                aimed |= any(report.aims for report in reports)
                yield reports
                continue
            materialize(sources.model, sources.block_names(step.name), sources.merged, device)
            with error_context(step.name):
                aims = find_layer_targets(step, apart)
            reports = _quantize_block(sources, step, aims, calibration, streams, emit_layer)
            aimed |= any(report.aims for report in reports)
            quantized = {f"{report.name}.weight" for report in reports}
            for name, tensor in step.block.state_dict(prefix=f"{step.name}.").items():
                if name in sources.names and name not in quantized:
                    emit(name, tensor.to(sources.stored_dtype(name) or tensor.dtype))
            step.finish()
            if not keep:
                to_meta(step.block)
            yield reports
        emit_output(first_tensor(walk.stacks[-1].outputs[0]))
        for task, head, found in heads.fits() if heads else ():
            emit_head(task, head, found)
        if apart and not aimed:
            sources.notes.append("no layer adds to the residual stream directly: expert_stream changed no target")


def _repeat(
    sources: Sources, step: BlockStep, done: Block, streams: dict[str, Teacher], device: torch.device, keep: bool
) -> list[LayerReport]:
    """Take all batches, and the experts, through a block that an earlier run has finished."""

    def read(name: str) -> Tensor:
        weight = done.layers.get(name.removesuffix(".weight"))
        if weight is None:
            return sources.merged(name)
        module = sources.model.get_submodule(name.removesuffix(".weight"))
        return as_matrix(module, weight.dequantize().float())

    reports = [LayerReport(**report) for report in done.reports]
    if not all(report.name.startswith(f"{step.name}.") for report in reports):
        raise RuntimeError(f"the finished block is not {step.name}: begin anew with --restart")
    materialize(sources.model, sources.block_names(step.name), read, device)
    for stream in streams.values():
        stream.run(step.name, ())
        stream.advance()
    step.finish()
    if not keep:
        to_meta(step.block)
    return reports


def _quantize_block(
    sources: Sources,
    step: BlockStep,
    aims: list[LayerTarget],
    calibration: Sequence[Calibration],
    streams: dict[str, Teacher],
    emit_layer: EmitLayer,
) -> list[LayerReport]:
    """Gather and solve the layers of the block that the walk is at, and put them into it, in the order of the forward.

    Each sees the inputs that the quantized layers before it give, and so mends what they left: a weight that is fitted
    to inputs that then change does harm.
    """
    features = sources.recipe.quantize.expert_features
    places = [place_of(group.names, residual_add) for group, residual_add in aims if residual_add or features]
    step.stop_at(
        [group.names[0] for group, _ in aims if group.calls == 1],
        {residual_add.rest for _, residual_add in aims if residual_add is not None},
    )
    reports: list[LayerReport] = []
    for shared, residual_add in aims:
        group = LayerGroup(sources, step, shared, residual_add)
        gather(sources, step, group, calibration, streams, places)
        return_freed_memory()  # activations that stay lie between what is freed
        with error_context(f"{step.name}.{group.names[0]}"):
            reports += _solve(sources, step, group, emit_layer)
        step.passed(group.names[0])
        del group
    for stream in streams.values():
        stream.advance()
    return_freed_memory()
    return reports


def find_layer_targets(step: BlockStep, apart: bool) -> list[LayerTarget]:
    """The block's layers by their inputs, in the order of the forward, with the sums that they aim at if `apart`."""
    groups = input_groups(step.block, lambda: step.run(0))
    alone = [group.names[0] for group in groups if len(group.names) == 1 and apart]
    sums = find_residual_adds(step.block, alone, lambda: step.run(0)) if alone else {}
    return [(group, sums.get(group.names[0])) for group in groups]


def load_outside(sources: Sources, device: torch.device) -> None:
    """Merge the tensors that lie outside the blocks (embeddings, norms, heads) into the model."""
    meta.load_outside(sources.model, sources.outside_names(), sources.merged, device, sources.tied)


def _solve(sources: Sources, step: BlockStep, group: LayerGroup, emit_layer: EmitLayer) -> list[LayerReport]:
    """Quantize the layers of one input group together and put the result into the live block."""
    settings, objective = sources.recipe.quantize, group.objective
    start = time.perf_counter()
    target, strength = group.merged, None
    if settings.anchor_strength is not None:
        target, strength = objective.target(settings.anchor_strength, settings.act_order)
    solved, loss, hessian, damping = _round(settings, objective, target, settings.damping or strength, group.dtype)
    solved, loss, rounded = rtn_fallback(solved, loss, target, hessian)
    if group.merged is objective.anchor:
        merge_loss = objective.anchor_loss(target, strength or 0.0, damping)
    else:
        merge_loss = hessian_loss(group.merged - target, hessian)
    seconds = (time.perf_counter() - start) / len(group.names)
    reports = []
    by_row = (part.split(group.rows) for part in (loss, merge_loss, rounded))
    for name, module, quantized, lost, off, nearest in zip(
        group.names, group.modules, solved.split(group.rows), *by_row
    ):
        full, shape = f"{step.name}.{name}", list(quantized.codes.shape)
        set_tensor(step.block, f"{name}.weight", as_matrix(module, quantized.dequantize().float()))
        emit_layer(full, module, quantized)
        losses = float(lost.sum()), float(off.sum())
        done = LayerReport(full, shape, group.names[0], *losses, strength, damping, group.tokens, seconds)
        reports.append(replace(done, aims=group.sum is not None, rounded=int(nearest.sum()), largest=group.largest))
    return reports


def _round(
    settings: Quantize, objective: Objective, target: Tensor, damping: float | None, dtype: torch.dtype
) -> tuple[QuantizedTensor, Tensor, Tensor, float]:
    """Codes, loss a row, the Hessian, and its damping: raised tenfold until it can be factored."""
    assert damping is not None
    factor, raised = objective.factor(damping, settings.act_order)
    search = settings.scales == "search"
    solved, loss = gptq(target, factor, settings.grid, search=search, scale_dtype=dtype)
    return solved, loss, objective.damped(raised), raised


def _blocks(model: nn.Module) -> Iterator[tuple[Stack, int, nn.Module]]:
    for stack in find_stacks(model):
        for index, block in enumerate(stack.blocks):
            yield stack, index, block
