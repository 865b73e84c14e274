"""Find a model's repeated blocks and the groups of linear layers that share an input.

Nothing here knows an architecture: blocks are the entries of the outermost `ModuleList`s that hold linear weights,
and layers belong together when they receive the same tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from epmq import matmul as products

LINEAR = (nn.Linear, Conv1D)
# A list of modules with a smaller share of the model's linear weights than this is not a stack of blocks.
SMALLEST_SHARE = 0.05


@dataclass
class Stack:
    """One chain of blocks, such as an encoder: a `ModuleList` by its name in the model, and its modules in order.

    `outputs` is what the last finished block returned, one entry a batch (kept by `epmq.calibration.sequential`).
    """

    name: str
    blocks: list[nn.Module]
    outputs: list[Any] = field(default_factory=list)

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks of repeated blocks, in order of definition; none of a model without linear layers in a list.

    A list of lists, such as Funnel's, is no stack: those in it are.
    """
    total = _linear_size(model) or 1
    stacks, outermost = list[Stack](), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not inside and _linear_size(module) >= SMALLEST_SHARE * total:
            outermost.append(name)
            stacks += _innermost(name, module)
    return stacks


def _innermost(name: str, blocks: nn.ModuleList) -> list[Stack]:
    """A list of blocks as a stack; the lists in it, where it holds nothing else."""
    lists = [block for block in blocks if isinstance(block, nn.ModuleList)]
    if not lists or len(lists) < len(blocks):
        return [Stack(name, list(blocks))]
    return [stack for index, inner in enumerate(lists) for stack in _innermost(f"{name}.{index}", inner)]


def linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names (within `module`) and modules of all linear layers in it."""
    return [(name, child) for name, child in module.named_modules() if isinstance(child, LINEAR)]


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Full names and modules of the linear layers in the model's blocks: everything that is quantized."""
    for stack in find_stacks(model):
        yield from stack_linears(stack)


def stack_linears(stack: Stack) -> Iterator[tuple[str, nn.Module]]:
    """Full names and modules of the linear layers in a stack's blocks."""
    for index, block in enumerate(stack.blocks):
        for name, linear in linears(block):
            yield f"{stack.block_name(index)}.{name}", linear


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer stores its weight as [in, out], as GPT-2's `Conv1D` does."""
    return isinstance(linear, Conv1D)


def as_matrix(linear: nn.Module, weight: Tensor) -> Tensor:
    """A linear layer's stored weight as [out, in]. Its own inverse."""
    return weight.T if is_transposed(linear) else weight


def use_fast_matmul(model: nn.Module) -> None:
    """Let a model's linear layers multiply by `epmq.matmul`, as long as no gradients are asked for."""
    for _, layer in linears(model) if products.uses_onednn() else ():
        if type(layer).forward in [layer_class.forward for layer_class in LINEAR]:  # not what a subclass makes of it
            layer.forward = partial(_multiply, layer)


def _multiply(layer: Any, inputs: Tensor) -> Tensor:
    return products.linear(inputs, as_matrix(layer, layer.weight), layer.bias)


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that receive the same input, by name and in order of call.

    `calls` is how often each is called in one forward of the block; None where that differs from batch to batch.
    `rows` is how many rows of inputs each call had, batch by batch.
    """

    names: list[str]
    calls: int | None
    rows: tuple[tuple[int, ...], ...] = ()


def input_groups(
    block: nn.Module, *runs: Callable[[], object], units: Mapping[str, nn.Module] | None = None
) -> list[InputGroup]:
    """The block's linear layers, put together where they receive the same input, in order of first call.

    Each of `runs` calls the block once on real data. A layer that none of them calls is left out. Modules in `units`
    stand for the layers in them, each in a group of its own.
    """
    seen: list[dict[str, tuple[Any, ...]]] = [_inputs_of(block, run, units or {}) for run in runs]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in dict.fromkeys(name for inputs in seen for name in inputs):
        groups.setdefault(tuple(inputs.get(name, ()) for inputs in seen), []).append(name)
    return [_group(names, inputs) for inputs, names in groups.items()]


def _group(names: list[str], inputs: Sequence[tuple[Any, ...]]) -> InputGroup:
    """A group by its names and the inputs of each run's calls, as `_inputs_of` gives them."""
    calls = {len(of_run) for of_run in inputs}
    rows = tuple(tuple(int(shape[:-1].numel()) for _, shape, _, _ in of_run) for of_run in inputs)
    return InputGroup(names, calls.pop() if len(calls) == 1 else None, rows)


def _inputs_of(
    block: nn.Module, run: Callable[[], object], units: Mapping[str, nn.Module]
) -> dict[str, tuple[Any, ...]]:
    """What each linear layer receives in a run, call by call: where the tensor lies and how it is laid out."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    # The tensors are kept until the end: a freed one could lend its address to another.
    with ExitStack() as hooks:
        inside = tuple(f"{name}." for name in units)
        alone = [(name, layer) for name, layer in linears(block) if not name.startswith(inside)]
        for name, module in [*alone, *units.items()]:
            hooks.enter_context(module.register_forward_pre_hook(note(name)))
        run()
    return {
        name: tuple((x.data_ptr(), x.shape, x.stride(), name if name in units else x.dtype) for x in inputs)
        for name, inputs in seen.items()
    }


def _linear_size(module: nn.Module) -> int:
    """Entries of the weights of all linear layers in a module."""
    return sum(linear.get_parameter("weight").numel() for _, linear in linears(module))


def is_padding_mask(value: object) -> bool:
    """Whether a model input is a padding mask: [batch, tokens] of integers or booleans."""
    return isinstance(value, Tensor) and value.ndim == 2 and not torch.is_floating_point(value)
