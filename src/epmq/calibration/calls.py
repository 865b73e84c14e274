"""Try a model's forward before anything is computed: which blocks it calls, how often, and on whose data.

The model's own code runs, on the real inputs: masks, lengths and image sizes are what they will be. Inside of the
blocks only shapes are computed, on the meta device: they give noise. Outside of them all weights are one. So a model of
any size takes seconds and no memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from epmq.data.encoding import split_first
from epmq.errors import InputError, error_context, reason
from epmq.merging.experts import ExpertSet
from epmq.models.blocks import LINEAR, Stack, find_stacks, linears, stack_linears
from epmq.models.hooks import stops_before, without_cache
from epmq.models.meta import load_outside, materialize, to_meta

# Examples of each form of inputs that are tried.
TRIED = 2
# Share of a stack's linear weights that may see no data.
IDLE = 0.5


@dataclass(frozen=True)
class BlockCalls:
    """How a model calls its blocks: their names in the order of their first calls, and those it calls repeatedly.

    By default all of its blocks, in one order, once each. `late` are the modules with weights outside of them that no
    block is called after, and linear layers that no block depends on, in the order of their calls.
    """

    order: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


@dataclass
class _Tried:
    """What the forwards of one task have called: blocks, forward by forward, and their linear layers."""

    sequences: list[list[str]] = field(default_factory=list)
    layers: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)  # blocks whose calls depend on values, such as a mixture's
    early: dict[str, None] = field(default_factory=dict)  # modules outside the blocks that a block is called after
    late: dict[str, None] = field(default_factory=dict)  # … that none is called after
    since: dict[str, None] = field(default_factory=dict)  # those called since the last block, in the forward that runs

    def call(self, block: str) -> None:
        """Note that a block is called."""
        self.sequences[-1].append(block)
        self.early |= self.since
        self.since.clear()

    def end(self) -> None:
        """Note that a forward has ended."""
        self.late.update(self.since)
        self.since.clear()


def try_forwards(
    experts: ExpertSet,
    calibration: Mapping[str, Sequence[dict[str, Any]]],
    stub: "StubModel | None" = None,
    solves: Callable[[str], bool] = lambda layer: True,
) -> BlockCalls:
    """Run the model without its weights on every form of calibration inputs there is.

    Args:
        experts: gives the model; what a task's data does not reach goes to its notes.
        calibration: task → inputs of the model, batch by batch.
        stub: the model without weights, where it is there already.
        solves: whether the layer of that name is one to be solved, so that data has to reach it.

    Raises:
        InputError: the model does not take the inputs, or a stack of its blocks sees no data.
    """
    stub, tried = stub or StubModel(experts), dict[str, _Tried]()
    for task, batches in calibration.items():
        tried[task] = _Tried()
        with error_context(f"experts.{task}.calibration"):
            for inputs in forms(batches):
                stub.run(inputs, tried[task])
    _check_reached(experts, tried, solves)
    sequences = [sequence for one in tried.values() for sequence in one.sequences]
    repeated = (name for sequence in sequences for name in sequence if sequence.count(name) > 1)
    early = dict.fromkeys(name for one in tried.values() for name in one.early)
    late = dict.fromkeys(name for one in tried.values() for name in one.late if name not in early)
    tried_inputs = [one for batches in calibration.values() for one in forms(batches)] if early else []
    layers = [name for name in early if isinstance(stub.outside[name], LINEAR)]
    late |= dict.fromkeys(name for name in layers if not stub.reaches_blocks(name, tried_inputs))
    return BlockCalls(_common_order(sequences), tuple(dict.fromkeys(repeated)), tuple(late))


def forms(batches: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of all batches that have the same arguments, the first examples of the one with the longest, on the CPU."""
    longest: dict[tuple[str, ...], dict[str, Any]] = {}
    for batch in batches:
        form = tuple(sorted(name for name, value in batch.items() if value is not None))
        if form not in longest or _length(batch) > _length(longest[form]):
            longest[form] = batch
    for batch in longest.values():
        yield {name: _on_cpu(value) for name, value in split_first([batch], TRIED)[0].items()}


def _length(batch: dict[str, Any]) -> int:
    return sum(value[:1].numel() for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _check_apart(experts: ExpertSet) -> None:
    """Check that each block has weights of its own: one that is solved must not change another."""
    for stack in find_stacks(experts.model):
        if len({id(block) for block in stack.blocks}) < len(stack.blocks):
            raise InputError(f"several blocks of {stack.name} are one and the same: use method: rtn")
        for index, block in enumerate(stack.blocks):
            for name, _ in linears(block):
                weight = f"{stack.block_name(index)}.{name}.weight"
                if weight in experts.tied:
                    raise InputError(f"{weight} is {experts.tied[weight]}, another block's: use method: none")


class StubModel:
    """A model without weights that can be run all the same, on a CPU."""

    def __init__(self, experts: ExpertSet) -> None:
        _check_apart(experts)
        self._experts, self.model = experts, experts.meta_model()
        self._shadows: dict[str, nn.Module] = {}
        self._modules: dict[str, nn.Module] = {}
        for stack in find_stacks(self.model):
            for index, block in enumerate(stack.blocks):
                self._modules[stack.block_name(index)] = block
        self._tried, self._nan_seen = _Tried([[]]), False
        meta = experts.meta_model()
        for name, block in self._modules.items():
            shadow = self._shadows[name] = meta.get_submodule(name).to("meta")
            for local, layer in linears(shadow):
                layer.register_forward_pre_hook(partial(self._note, f"{name}.{local}"))
            block.forward = partial(self._call, name)
        inside = {id(module) for block in self._modules.values() for module in block.modules()}
        self.outside = {name: one for name, one in self.model.named_modules() if id(one) not in inside}
        _fill(self.outside.values(), 1.0)
        for name, module in self.outside.items():
            if module._parameters:
                module.register_forward_pre_hook(partial(self._note_outside, name))

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], tried: _Tried) -> None:
        """Run the model up to its output layer, and note what it calls.

        Raises:
            InputError: the model does not take the inputs.
        """
        self._tried = tried
        with without_cache(self.model):
            try:
                tried.sequences.append([])
                stops_before(self.model, self.model.get_output_embeddings(), inputs)
                tried.end()
            except Exception:  # it may be the weights' fault
                tried.since.clear()
                tried.sequences[-1] = _run_base(self._experts, inputs)
                tried.unknown.update(tried.sequences[-1])

    @torch.no_grad()
    def reaches_blocks(self, name: str, inputs: Sequence[dict[str, Any]]) -> bool:
        """Whether a block reads what a module outside of them gives: weights that are no number leave a trace there."""
        self._nan_seen, tried = False, _Tried()
        with nan_weights(self.outside[name]):
            for one in inputs:
                self.run(one, tried)
        return self._nan_seen or bool(tried.unknown)  # where values decide, it may

    def _note_outside(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tried.since[name] = None

    def _note(self, layer: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tried.layers.add(layer)

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """What the block of that name gives, by its shapes."""
        self._tried.call(name)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._nan_seen |= any(bool(value.isnan().any()) for value in tensors if value.is_floating_point())
        try:
            return _as_noise(self._shadows[name](*on_meta(args), **on_meta(kwargs)))
        except Exception:  # which of its layers it calls depends on values
            self._tried.unknown.add(name)
        block = self._modules[name]
        with _filled(block):
            return type(block).forward(block, *args, **kwargs)


@contextmanager
def nan_weights(module: nn.Module) -> Iterator[None]:
    """Weights that are no number in the place of a module's own for the length of a `with` block."""
    plain = dict(module._parameters)
    for leaf, parameter in plain.items():
        if parameter is not None and parameter.is_floating_point():
            nan = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[leaf] = nn.Parameter(nan, requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(plain)


def _run_base(experts: ExpertSet, inputs: dict[str, Any]) -> list[str]:
    """Names of the blocks that the base calls, in order; it is read block by block.

    Raises:
        InputError: it does not take the inputs.
    """
    model, calls, cpu = experts.meta_model(), list[str](), torch.device("cpu")
    load_outside(model, experts.outside_names(), experts.base.tensor, cpu, experts.tied)

    def call(name: str, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        materialize(model, experts.block_names(name), experts.base.tensor, cpu)
        output = forward(*args, **kwargs)
        to_meta(model.get_submodule(name))
        return output

    for stack in find_stacks(model):
        for index, block in enumerate(stack.blocks):
            block.forward = partial(call, stack.block_name(index), block.forward)
    try:
        with without_cache(model):
            stops_before(model, model.get_output_embeddings(), inputs)
    except Exception as error:
        given = ", ".join(inputs)
        raise InputError(f"{type(model).__name__} cannot take these inputs ({reason(error)}): {given}") from None
    return calls


def on_meta(values: Any) -> Any:
    """The same nested values, with tensors of which only the shape is left."""
    return tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, values)


def _as_noise(values: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        filled = torch.zeros(value.shape, dtype=value.dtype)
        return filled.normal_(generator=generator) if value.is_floating_point() else filled

    return tree_map(noise, values)


def _fill(modules: Iterable[nn.Module], value: float) -> None:
    """Put ones or zeros in the place of parameters that have no storage; zeros are laid out as weights are."""
    for module in modules:
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                shape, dtype = parameter.shape, parameter.dtype
                filled = torch.ones((), dtype=dtype).expand(shape) if value else torch.zeros(shape, dtype=dtype)
                module._parameters[leaf] = nn.Parameter(filled, requires_grad=False)


@contextmanager
def _filled(block: nn.Module) -> Iterator[None]:
    """Zeros in the place of a block's parameters for the length of a `with` block."""
    _fill(block.modules(), 0.0)
    try:
        yield
    finally:
        to_meta(block)


def _check_reached(experts: ExpertSet, tried: Mapping[str, _Tried], solves: Callable[[str], bool]) -> None:
    """Check that every stack with layers to solve sees data; note whose data does not reach one that others' does."""
    for stack in find_stacks(experts.model):
        if not any(solves(name) for name, _ in stack_linears(stack)):
            continue
        reaching = [task for task, one in tried.items() if any(_in(stack, name) for name in _blocks(one))]
        if not reaching:
            raise InputError(
                f"calibration: no data reaches {stack.name} of {type(experts.model).__name__}: give examples with "
                f"{_main_input(experts.model, stack)}, or use method: rtn"
            )
        idle, total = _idle_share(stack, tried, solves)
        if len(idle) and sum(idle.values()) > IDLE * total:
            raise InputError(
                f"calibration: no data reaches {len(idle)} linear layers of {stack.name}, such as {min(idle)}, more "
                "than half of its weights: use method: rtn"
            )
        for task in tried.keys() - set(reaching):
            experts.notes.append(f"{stack.name} is not calibrated on {task}, whose data does not reach it")


def _blocks(tried: _Tried) -> set[str]:
    return {name for sequence in tried.sequences for name in sequence}


def _in(stack: Stack, name: str) -> bool:
    return name.startswith(stack.name + ".")


def _idle_share(stack: Stack, tried: Mapping[str, _Tried], solves: Callable[[str], bool]) -> tuple[dict[str, int], int]:
    """Linear layers of a stack to be solved that see no data, with the size of their weights; and the size of all."""
    seen = {layer for one in tried.values() for layer in one.layers}
    unknown = tuple(f"{name}." for one in tried.values() for name in one.unknown)
    sizes = {name: one.get_parameter("weight").numel() for name, one in stack_linears(stack) if solves(name)}
    idle = {name: size for name, size in sizes.items() if name not in seen and not name.startswith(unknown)}
    return idle, sum(sizes.values())


def _main_input(model: nn.Module, stack: Stack) -> str:
    """What the part of the model that holds a stack calls its main input."""
    parts = stack.name.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    return next((str(owner.main_input_name) for owner in owners if hasattr(owner, "main_input_name")), "other inputs")


def _common_order(sequences: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """One order of all blocks that agrees with the first calls in every forward."""
    order: list[str] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        place = 0
        for name in dict.fromkeys(sequence):
            if name not in order:
                order.insert(place, name)
            place = max(place, order.index(name) + 1)
    return tuple(order)
