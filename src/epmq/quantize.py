"""The loop: walk the merged model block by block, collect moments, solve, write the quantized layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import InputGroup, Stack, as_matrix, find_stacks, hooks, input_groups, linears
from epmq.grid import QuantizedTensor
from epmq.moments import Moments
from epmq.objective import Objective
from epmq.skeleton import drop_tensors, set_tensor
from epmq.solvers import gptq, hessian_loss, rtn
from epmq.sources import Sources
from epmq.walk import Batch, Step, Walk

Emit = Callable[[str, Tensor], None]
EmitLayer = Callable[[str, nn.Module, QuantizedTensor], None]


import os
SHIFT = os.environ.get("SHIFT", "1") == "1"


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


@dataclass
class Calibration:
    """One task's calibration batches."""

    task: str
    batches: list[Batch]


def check_grid(sources: Sources) -> None:
    """Check before any compute that the grid fits every layer that would be quantized.

    Raises:
        ValueError: a layer does not fit; it is named.
    """
    grid = sources.recipe.quantize.grid
    for stack in find_stacks(sources.model):
        for index, block in enumerate(stack.blocks):
            for name, linear in linears(block):
                weight = as_matrix(linear, linear.weight)  # type: ignore[arg-type]
                try:
                    grid.width(weight.shape[1])
                except ValueError as error:
                    raise ValueError(f"quantize.group_size: {stack.block_name(index)}.{name}: {error}") from None


def read_blocks(sources: Sources, emit: Emit) -> Iterator[list[LayerReport]]:
    """Emit the merged tensors of the blocks as they are; yields an empty report a block."""
    for stack, index, _ in _blocks(sources.model):
        for name in _block_names(sources, stack.block_name(index)):
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
        for name in _block_names(sources, prefix):
            local = name[len(prefix) + 1 :].removesuffix(".weight")
            if local not in layers or not name.endswith(".weight"):
                emit(name, sources.merged(name))
                continue
            weight = as_matrix(layers[local], sources.merged(name))
            start = time.perf_counter()
            quantized = rtn(weight, sources.recipe.quantize.grid, weight.dtype)
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
    batches = [batch for part in calibration for batch in part.batches]
    for step in Walk(sources.model, batches):
        for name in _block_names(sources, step.name):
            set_tensor(sources.model, name, sources.merged(name).to(device))
        with _naming(step.name):
            groups = input_groups(step.block, lambda step=step: step.run(0))  # type: ignore[misc]
        reports: list[LayerReport] = []
        for together in [[group] for group in groups] if sources.recipe.quantize.sequential else [groups]:
            for group, gathered in zip(together, _gather(sources, step, together, calibration)):
                with _naming(f"{step.name}.{group.names[0]}"):
                    reports += _solve(sources, step, group.names, gathered, emit_layer)
        quantized = {f"{report.name}.weight" for report in reports}
        for name in _block_names(sources, step.name):
            if name not in quantized:
                emit(name, sources.model.state_dict()[name])
        step.finish()
        if not keep:
            drop_tensors(step.block)
        yield reports


def load_outside(sources: Sources, emit: Emit, device: torch.device) -> None:
    """Merge the tensors that lie outside the blocks (embeddings, norms, heads) into the skeleton, and emit them."""
    prefixes = tuple(stack.name + "." for stack in find_stacks(sources.model))
    for name in sources.names:
        if not name.startswith(prefixes):
            tensor = sources.merged(name)
            emit(name, tensor)
            set_tensor(sources.model, name, tensor.to(device))
    sources.model.tie_weights()


class _Enough(Exception):
    """All layers of interest have seen their input: the rest of the block need not run."""


def _gather(
    sources: Sources, step: Step, groups: list[InputGroup], calibration: Sequence[Calibration]
) -> list[tuple[Objective, int]]:
    """The objective and the number of tokens of some of a block's input groups, one task at a time."""
    layers = dict(linears(step.block))
    guided = sources.recipe.quantize.method == "expert_guided"
    objectives = [Objective(_stacked(step, group.names)) for group in groups]
    tokens = [0] * len(groups)
    batch = 0
    for part in calibration:
        moments = [Moments(objective.anchor.shape[1], objective.anchor.device) for objective in objectives]
        pairs = [(layers[group.names[0]], _adder(step, m)) for group, m in zip(groups, moments)]
        pairs.append((layers[groups[-1].names[0]], _stopper(groups[-1].calls)))
        with hooks(pairs):
            for _ in part.batches:
                with suppress(_Enough):
                    step.run(batch)
                batch += 1
        for i, (group, objective) in enumerate(zip(groups, objectives)):
            expert = _stacked_expert(sources, step, group.names, part.task) if guided else None
            shift = _stacked_shift(sources, step, group.names, part.task) if guided and SHIFT else None
            with _naming(f"{step.name}.{group.names[0]}, task {part.task}"):
                objective.add(moments[i], sources.recipe.task_weight(part.task), expert, shift)
            tokens[i] += moments[i].count
    return list(zip(objectives, tokens))


def _solve(
    sources: Sources, step: Step, group: list[str], gathered: tuple[Objective, int], emit_layer: EmitLayer
) -> list[LayerReport]:
    """Quantize the layers of one input group together and put the result into the live block."""
    settings, (objective, tokens), layers = sources.recipe.quantize, gathered, dict(linears(step.block))
    start = time.perf_counter()
    target, hessian, strength = objective.solve(settings.strength)
    dtype = _weight(layers[group[0]]).dtype
    solved, loss = gptq(target, hessian, settings.grid, act_order=settings.act_order, scale_dtype=dtype)
    merge_loss = hessian_loss(objective.anchor - target, hessian)
    seconds = (time.perf_counter() - start) / len(group)
    rows = [as_matrix(layers[name], _weight(layers[name])).shape[0] for name in group]
    reports = []
    for name, quantized, lost, off in zip(group, solved.split(rows), loss.split(rows), merge_loss.split(rows)):
        full = f"{step.name}.{name}"
        set_tensor(step.block, f"{name}.weight", as_matrix(layers[name], quantized.dequantize()))
        emit_layer(full, layers[name], quantized)
        shape = list(quantized.codes.shape)
        reports.append(
            LayerReport(full, shape, group[0], float(lost.sum()), float(off.sum()), strength, tokens, seconds)
        )
    return reports


def _adder(step: Step, moments: Moments) -> Callable[..., None]:
    return lambda module, args: moments.add(args[0], step.mask(args[0]))


def _stopper(calls: int) -> Callable[..., None]:
    seen = 0

    def stop(module: nn.Module, args: tuple) -> None:
        nonlocal seen
        seen += 1
        if seen % calls == 0:
            raise _Enough

    return stop


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _stacked(step: Step, group: list[str]) -> Tensor:
    layers = dict(linears(step.block))
    return torch.cat([as_matrix(layers[name], _weight(layers[name])) for name in group])


def _stacked_expert(sources: Sources, step: Step, group: list[str], task: str) -> Tensor:
    layers = dict(linears(step.block))
    parts = [sources.expert_tensor(task, f"{step.name}.{name}.weight") for name in group]
    weights = [as_matrix(layers[name], part) for name, part in zip(group, parts)]
    return torch.cat(weights).to(_weight(layers[group[0]]).device)


def _stacked_shift(sources: Sources, step: Step, group: list[str], task: str) -> Tensor | None:
    """The experts' biases less the merged ones, stacked; zero rows for layers without a bias."""
    parts, layers = [], dict(linears(step.block))
    for name in group:
        bias = layers[name].bias
        if bias is None:
            parts.append(torch.zeros(as_matrix(layers[name], _weight(layers[name])).shape[0]))
        else:
            parts.append(sources.expert_tensor(task, f"{step.name}.{name}.bias").float() - bias.detach().cpu().float())
    return torch.cat(parts).to(_weight(layers[group[0]]).device)


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


def _block_names(sources: Sources, prefix: str) -> list[str]:
    return [name for name in sources.names if name.startswith(prefix + ".")]
