"""What a plan is scaled up from: one block of each stack on a few examples, and the solver's parts at small sizes."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.engine import find_layer_targets
from epmq.calibration.sequential import Batch, BlockStep, SequentialCalibrator
from epmq.matmul import matmul
from epmq.merging.experts import Sources
from epmq.models.blocks import as_matrix, find_stacks, linears
from epmq.models.hooks import pre_hooks
from epmq.models.meta import load_outside, materialize
from epmq.quantization.factor import factorize
from epmq.quantization.gptq import gptq
from epmq.quantization.hessian import Moments
from epmq.quantization.objective import Objective
from epmq.quantization.rtn import rtn
from epmq.recipe import Quantize
from epmq.runtime import return_freed_memory

# Columns and rows of the matrices that are timed, and tokens, at most.
COLUMNS, ROWS, TOKENS = 768, 512, 1024


@dataclass(frozen=True)
class GroupTrial:
    """Layers that share an input, as found in a block on the examples that were tried.

    Attributes:
        columns: of the input.
        rows: of the layers, one below the other.
        tokens: that a layer receives, in all its calls.
        aims: whether they aim at a sum in the residual stream.
        waiting: bytes that the examples hold while they wait before the first layer.
    """

    columns: int
    rows: int
    tokens: int
    aims: bool
    waiting: int


@dataclass(frozen=True)
class StackTrial:
    """One block of a stack on the examples that were tried.

    Attributes:
        blocks: of the stack.
        seconds: that one block takes for the examples.
        entry: bytes that the examples hold while they wait before the block.
        size: entries of a block's tensors.
    """

    blocks: int
    seconds: float
    entry: int
    size: int
    groups: list[GroupTrial]


@torch.no_grad()
def try_stacks(sources: Sources, batch: Batch, apart: bool, device: torch.device) -> list[StackTrial]:
    """Take a few examples through the base's first block of each stack; its other blocks give what the first one gave.

    Args:
        sources: base and experts; they stay as they are.
        batch: the examples, as inputs of the model.
        apart: whether layers may aim at sums in the residual stream.
        device: where blocks live.
    """
    model = sources.skeleton()
    load_outside(model, sources.outside_names(), sources.base_tensor, device, sources.tied)
    for stack in find_stacks(model):
        materialize(model, sources.block_names(stack.block_name(0)), sources.base_tensor, device)
        _repeat_first(stack.blocks)
    trials = []
    with _new_only():
        for step in SequentialCalibrator(model, [batch]):
            if step.index == 0:
                trials.append(_try_block(sources, step, apart, device))
            step.finish()
    return trials


def _repeat_first(blocks: list[nn.Module]) -> None:
    given: list[Any] = []
    blocks[0].register_forward_hook(lambda module, args, output: given.__setitem__(slice(None), [output]))
    for block in blocks[1:]:
        block.forward = lambda *args, **kwargs: given[0]  # type: ignore[method-assign]


def _try_block(sources: Sources, step: BlockStep, apart: bool, device: torch.device) -> StackTrial:
    entry, tokens = _held(), dict[str, int]()

    def count(name: str) -> Callable[..., None]:
        return lambda module, args: tokens.update({name: tokens.get(name, 0) + args[0].numel() // args[0].shape[-1]})

    with pre_hooks([(module, count(name)) for name, module in linears(step.block)]):
        step.run(0)
    seconds = timed(lambda: _run_afresh(step), device)
    aims = find_layer_targets(step, apart)
    step.stop_at([group.names[0] for group, _ in aims if group.calls == 1], {sum_.rest for _, sum_ in aims if sum_})
    groups = []
    for group, sum_ in aims:
        layers = [step.block.get_submodule(name) for name in group.names]
        shapes = [as_matrix(layer, layer.weight).shape for layer in layers]  # type: ignore[arg-type]
        if group.calls == 1:
            step.reach(0, group.names[0])
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        groups.append(GroupTrial(columns, rows, tokens[group.names[0]], sum_ is not None, _held()))
        step.passed(group.names[0])
    size = sum(math.prod(sources.base_shape(name)) for name in sources.block_names(step.name))
    return StackTrial(len(step.stack.blocks), seconds, entry, size, groups)


def _run_afresh(step: BlockStep) -> None:
    """Run the block on new memory, as each batch does that has to wait with what it holds."""
    return_freed_memory()
    step.run(0)


@contextmanager
def _new_only() -> Iterator[None]:
    """Let the garbage collector list nothing of what there is already, which would take long."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _held() -> int:
    """Bytes of the memory behind all tensors that are new."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that some work takes, the median of three after a first one."""
    work()
    spent = []
    for _ in range(3):
        start = clock(device)
        work()
        spent.append(clock(device) - start)
    return statistics.median(spent)


def clock(device: torch.device) -> float:
    """The wall's clock; with one thread the processor's, which other programs on a busy machine do not move."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, in seconds.

    Attributes:
        product: a multiplication and addition in a matrix product.
        change: an entry that is read, changed and written elsewhere.
        merge: an entry of a merged tensor.
        read: an entry of an expert's tensor, with what it takes to apply an adapter.
    """

    product: float
    change: float
    merge: float
    read: float


def measure_rates(sources: Sources, device: torch.device) -> Rates:
    """Time products and passes on random numbers, and merging and reading on one tensor of a block."""
    left, right = (torch.randn(size, device=device) for size in ((TOKENS, COLUMNS), (COLUMNS, ROWS)))
    entries = torch.randn(4 * COLUMNS, COLUMNS, device=device)
    stack, tensorwise = find_stacks(sources.model)[0], copy.copy(sources)
    # A threshold over the model costs as much an entry as one over a tensor, and is not looked for here.
    merge = sources.recipe.merge.model_copy(update={"trim": "tensor"})
    tensorwise.recipe = sources.recipe.model_copy(update={"merge": merge})
    sizes = {name: math.prod(sources.base_shape(name)) for name in sources.block_names(stack.block_name(0))}
    name, task = max(sizes, key=lambda name: sizes[name]), next(iter(sources.experts))
    return Rates(
        timed(lambda: matmul(left, right), device) / (TOKENS * COLUMNS * ROWS),
        timed(lambda: entries * 2, device) / entries.numel(),
        timed(lambda: tensorwise.merged(name).to(device), device) / sizes[name],
        timed(lambda: sources.expert_tensor(task, name).to(device) * 2, device) / sizes[name],
    )


def moments_seconds(columns: int, device: torch.device) -> float:
    """Seconds that a token takes to be added to the moments of an input."""
    tried = min(columns, COLUMNS)
    moments, inputs = Moments(tried, device), torch.randn(TOKENS, tried, device=device)
    return timed(lambda: moments.add(inputs), device) / TOKENS * (columns / tried) ** 2


def factor_seconds(columns: int, device: torch.device) -> float:
    """Seconds that the factor of a Hessian takes."""
    hessian = _hessian(min(columns, COLUMNS), device)
    return timed(lambda: factorize(hessian), device) * (columns / len(hessian)) ** 3


def target_seconds(columns: int, rows: int, device: torch.device) -> float:
    """Seconds that the continuous optimum of layers takes, given the factor."""
    objective = Objective(torch.randn(min(rows, ROWS), min(columns, COLUMNS), device=device))
    objective.hessian = _hessian(len(objective.hessian), device)
    objective.correction = objective.anchor
    objective.factor(1.0)
    wide, tall = columns / objective.anchor.shape[1], rows / objective.anchor.shape[0]
    return timed(lambda: objective.target(1.0), device) * tall * wide**2


def codes_seconds(columns: int, rows: int, settings: Quantize, product: float, device: torch.device) -> float:
    """Seconds that it takes to choose codes by GPTQ, given the factor.

    Args:
        columns, rows: of the weight.
        settings: grid, scales, order of columns.
        product: see `Rates`.
        device: where.
    """
    weight = torch.randn(min(rows, ROWS), min(columns, COLUMNS), device=device)
    hessian, search = _hessian(weight.shape[1], device), settings.scales == "search"
    factor = factorize(hessian, settings.act_order)
    whole = timed(lambda: gptq(weight, factor, settings.grid, search=search), device)
    products = product * weight.numel() * weight.shape[1] / 2
    wide, tall = columns / weight.shape[1], rows / len(weight)
    return products * tall * wide**2 + max(whole - products, 0) * tall * wide


def rounding_seconds(settings: Quantize, device: torch.device) -> float:
    """Seconds that an entry of a weight takes to be rounded to nearest."""
    weight, search = torch.randn(ROWS, COLUMNS, device=device), settings.scales == "search"
    return timed(lambda: rtn(weight, settings.grid, search=search), device) / weight.numel()


def _hessian(columns: int, device: torch.device) -> Tensor:
    inputs = torch.randn(columns, columns, device=device)
    return (inputs.T @ inputs / columns).add_(torch.eye(columns, device=device))
