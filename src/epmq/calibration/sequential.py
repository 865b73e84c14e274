"""Take calibration batches through a model block by block, with the model's own code as the driver.

Every batch has a forward of the model to itself, and all these forwards go side by side: each waits at the entry of
the block that is calibrated, and inside of it before whichever layer it is asked to wait. So every layer runs once on
every batch, every argument beside the hidden state (masks, position bias, rotary embeddings, encoder states, whatever
differs from block to block) is exactly what the model passes, and no architecture has to be listed.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from epmq.calibration.masks import padding_mask
from epmq.calibration.offload import Offloader
from epmq.calibration.outside import OutsideStep
from epmq.errors import InputError
from epmq.models.blocks import Stack, find_stacks, linears
from epmq.models.hooks import HookPoint, stops_before, watch, without_cache


@dataclass(frozen=True)
class Batch:
    """Calibration inputs: keyword arguments of the model's forward, with their number among the task's batches."""

    task: str
    index: int
    inputs: dict[str, Any]


@dataclass
class BlockEntry:
    """A forward that waits at the entry of a block, which it is about to call with these arguments."""

    stack: Stack
    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owner_arguments: dict[str, Any]  # of the part of the model that holds the stack

    @property
    def name(self) -> str:
        return self.stack.block_name(self.index)


@dataclass
class PausedForward:
    """A forward that waits before a layer of the block, which it is about to call on these inputs."""

    layer: str
    inputs: Tensor
    others: tuple[Any, ...] = ()  # positional arguments beside these


# Where a batch's forward waits; None where it has left the last block.
State = BlockEntry | PausedForward | None


class SequentialCalibrator:
    """Steps through all blocks of a model.

    Args:
        model: the model in eval mode. Parameters outside the blocks must be real; a block's own may be on the meta
            device until the loop body for it runs.
        batches: calibration inputs.
        on_finished: called with each batch when all blocks are finished: a forward of the model then costs no more
            than what lies outside of its blocks.
        offloader: takes what batches hold while they wait.
        outputs_for: how many batches, from the first on, go through the last block to its end; None for all. The
            others stay before the last layers that they are taken to. Without `on_finished` only.
        order: names of the blocks that any batch calls, in an order that agrees with every batch's forward; a batch
            need not call all of them. Without it each batch calls all blocks of the model, in one order.
        outside: names of linear layers that are called after the last block; they are the last step.

    `for step in SequentialCalibrator(model, batches)` yields a `BlockStep` a block, in the order of the model's
    forward. The body loads the block, tries it (`step.run`), takes the batches from layer to layer (`step.run_until`)
    while it changes the layers that lie ahead, and ends with `step.finish()`, which takes all batches to the next
    block.

    Attributes:
        first_output: what the last block that was called gave on the first batch.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Batch],
        on_finished: Callable[[Batch], None] | None = None,
        offloader: Offloader | None = None,
        outputs_for: int | None = None,
        order: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> None:
        self.outside = outside
        to_the_end = outputs_for is None or on_finished is not None or bool(outside)
        self.outputs_for = len(batches) if to_the_end or outputs_for is None else outputs_for
        self.model, self.batches, self.on_finished = model, batches, on_finished
        self.offloader = offloader or Offloader()
        self.stacks = find_stacks(model)
        self.block_count = sum(len(stack.blocks) for stack in self.stacks)
        names = [stack.block_name(index) for stack in self.stacks for index in range(len(stack.blocks))]
        self._order, self._whole = list(order) or names, not order
        self._ends = {
            max((name for name in self._order if name.startswith(stack.name + ".")), key=self._order.index, default="")
            for stack in self.stacks
        }
        self.first_output: Any = None
        self.position = 0  # of the batch whose forward runs
        self._owner_arguments: list[dict[str, dict[str, Any]]] = []
        self._blocks_done: list[int] = []
        self._forwards: list[greenlet] = []
        self._passed: set[str] = set()

    def __iter__(self) -> "Generator[BlockStep | OutsideStep, None, None]":
        count = len(self.batches)
        self._blocks_done, self._owner_arguments = [0] * count, [{} for _ in self.batches]
        self._passed, self.first_output = set[str](), None
        for stack in self.stacks:
            stack.outputs = [None] * count
        with ExitStack() as undo:
            undo.enter_context(without_cache(self.model))
            for stack in self.stacks:
                undo.enter_context(self._record_arguments(stack))
                for index, block in enumerate(stack.blocks):
                    block.forward = partial(self._before_block, stack, index, block.forward)
                    undo.callback(block.__dict__.pop, "forward", None)
                    undo.enter_context(block.register_forward_hook(partial(self._after_block, stack, index)))
            self._forwards = [greenlet(self._forward) for _ in self.batches]
            undo.callback(self._end)
            states = [self.resume(position) for position in range(count)]
            while waiting := [state for state in states if isinstance(state, BlockEntry)]:
                # Where batches wait at different blocks, the first: those of the others come by it no more.
                name = waiting[0].name if self._whole else min((state.name for state in waiting), key=self._rank)
                members = [
                    at for at, state in enumerate(states) if isinstance(state, BlockEntry) and state.name == name
                ]
                step = BlockStep(self, name, members, states)
                yield step
                if not step.finished:
                    raise RuntimeError(f"{step.name}: the loop went on without finish()")
                states = step.next_states
                self._passed.add(name)
                del step, waiting  # and with them the blocks' inputs
            self._end()
            if self.on_finished is not None or self.outside:
                self._replay_outputs()
                yield from self._after_blocks()

    def _after_blocks(self) -> "Generator[BlockStep | OutsideStep, None, None]":
        """What follows on the last block: a step of the layers outside, and `on_finished`."""
        if self.outside:
            yield OutsideStep(self, self.outside)
        for position, batch in enumerate(self.batches if self.on_finished is not None else ()):
            self.position = position
            self.on_finished(batch)  # type: ignore[misc]

    @torch.no_grad()
    def run_outside(self, position: int) -> None:
        """Run the model on a batch, up to its output layer, when all blocks are finished."""
        self.position, model = position, self.model
        stops_before(model, model.get_output_embeddings(), self.batches[position].inputs)

    def resume(self, position: int) -> State:
        """Let the forward of a batch go on until it waits again; None when it has left the last block.

        Raises:
            ValueError: it ended before all blocks were called.
        """
        self.position = position
        # Grad mode is the thread's: it must be what it was when another forward or the caller goes on.
        with torch.no_grad():
            state: State = self._forwards[position].switch()
        if isinstance(state, BlockEntry):
            self.offloader.put([*state.args, *state.kwargs.values()])
        if state is None and self._whole and self._blocks_done[position] < self.block_count:
            stacks, model = ", ".join(stack.name for stack in self.stacks), type(self.model).__name__
            raise ValueError(f"the forward of {model} ended before all blocks of {stacks} were called")
        return state

    def is_last(self, name: str) -> bool:
        """Whether no batch calls any block after this one."""
        return min(self._blocks_done) >= self.block_count - 1 if self._whole else name == self._order[-1]

    def _rank(self, name: str) -> int:
        return self._order.index(name) if name in self._order else len(self._order)

    def in_forward(self) -> bool:
        """Whether the code that asks is a batch's forward, not a call from outside."""
        return bool(self._forwards) and getcurrent() is self._forwards[self.position]

    def pause(self, state: State) -> None:
        """Let the batch's forward, which calls this, wait until it is resumed."""
        getcurrent().parent.switch(state)

    def _forward(self) -> None:
        self.model(**self.batches[self.position].inputs)

    def _before_block(self, stack: Stack, index: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.in_forward():
            entry = BlockEntry(stack, index, args, kwargs, self._owner_arguments[self.position][stack.name])
            if entry.name in self._passed:
                raise InputError(f"{entry.name} is called once more than the first examples let see: use method: rtn")
            self.pause(entry)
        return forward(*args, **kwargs)

    def _after_block(self, stack: Stack, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.in_forward():
            return
        name = stack.block_name(index)
        self._blocks_done[self.position] += 1
        if name in self._ends:
            stack.outputs[self.position] = output
        if self.position == 0:
            self.first_output = output
        if self.is_last(name) if not self._whole else self._blocks_done[self.position] == self.block_count:
            self.pause(None)  # what follows is not asked for

    def _replay_outputs(self) -> None:
        """Let every block give what the last of its stack gave on the batch."""
        for stack in self.stacks:
            for block in stack.blocks:
                block.forward = lambda *args, stack=stack, **kwargs: stack.outputs[self.position]

    def _end(self) -> None:
        for forward in self._forwards:
            forward.throw()
        self._forwards = []

    def _record_arguments(self, stack: Stack) -> Any:
        return record_arguments(
            owner_of(self.model, stack, self.stacks),
            lambda arguments: self._owner_arguments[self.position].__setitem__(stack.name, arguments),
        )


def record_arguments(owner: nn.Module, note: Callable[[dict[str, Any]], object]) -> RemovableHandle:
    """Note what the owner of a stack is called with: it is where padding masks are still what the user gave."""
    signature = inspect.signature(owner.forward)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        note(bound | bound.get("kwargs", {}))

    return owner.register_forward_pre_hook(record, with_kwargs=True)


def owner_of(model: nn.Module, stack: Stack, stacks: Sequence[Stack]) -> nn.Module:
    """The outermost module that holds this stack and no other: T5's decoder, CLIP's text model, a whole BERT.

    Stacks that follow each other in one list, such as Funnel's, have the module that holds the list.
    """
    others = [other.name for other in stacks if other is not stack]
    parts = stack.name.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[:depth])
        if not any(other.startswith(name + "." if name else "") for other in others):
            return model.get_submodule(name)
    holders = (model.get_submodule(".".join(parts[:depth])) for depth in reversed(range(len(parts))))
    return next(holder for holder in holders if not isinstance(holder, nn.ModuleList))


class BlockStep:
    """One block, by its name in the model, with the batches that call it at its entry.

    Batches are named by their position in the calibrator's list; `members` are those that are here. `next_states` says
    where each waits once these have left.
    """

    lockstep = True  # batches can wait before a layer

    def __init__(
        self, calibrator: SequentialCalibrator, name: str, members: list[int], states: Sequence[Any] = ()
    ) -> None:
        self._calibrator, self._entries, self.batches = calibrator, states, calibrator.batches
        self.name, self.block = name, calibrator.model.get_submodule(name)
        self.stack = next(stack for stack in calibrator.stacks if name.startswith(stack.name + "."))
        self.members = [(position, calibrator.batches[position]) for position in members]
        self.next_states: list[State] = [
            None if position in members else state for position, state in enumerate(states)
        ]
        self._paused: list[PausedForward | None] = [None] * len(states)
        self._has_left = [position not in members for position in range(len(states))]
        self._kept: list[dict[HookPoint, Tensor]] = [{} for _ in states]
        self._ahead: set[str] = set()
        self.missed: Counter[str] = Counter()  # layer → rows of inputs that came when it was solved already
        self._undo = ExitStack()
        self.position = 0  # of the batch that runs

    @property
    def layers(self) -> list[str]:
        """Names of the block's linear layers."""
        return [name for name, _ in linears(self.block)]

    @property
    def finished(self) -> bool:
        """Whether all batches have left the block."""
        return all(self._has_left)

    @torch.no_grad()
    def run(self, position: int) -> Any:
        """The block's output on one batch, as the block is now. The batch's forward stays where it is."""
        self.position = position
        entry = self._entries[position]
        return self.block(*entry.args, **entry.kwargs)

    def pause_before(self, layers: Sequence[str], keep: Iterable[str] = ()) -> None:
        """Say before which layers every batch is to wait, and whose inputs are kept on its way (`kept_input`).

        Raises:
            RuntimeError: it has been said before.
        """
        if self._ahead:
            raise RuntimeError(f"{self.name}: batches are under way")
        self._ahead = set(layers)
        for layer in layers:
            module = self.block.get_submodule(layer)
            self._undo.enter_context(module.register_forward_pre_hook(partial(self._before_layer, layer)))
        for point in keep:
            self._undo.enter_context(watch(self.block, point, partial(self._keep, point)))

    def run_until(self, position: int, layer: str) -> Tensor | None:
        """Take a batch to a layer of `pause_before`; layers before it must be what they are to be.

        Returns the layer's inputs; None if the batch does not come by it.
        """
        self.position = position
        paused = self._paused[position]
        while not self._has_left[position] and (paused is None or paused.layer not in self._ahead):
            paused = self._paused[position] = self._resume(position)
        return paused.inputs if paused is not None and paused.layer == layer else None

    def waiting(self, position: int) -> PausedForward:
        """Where a batch waits inside of the block, with the inputs of the layer that comes next."""
        paused = self._paused[position]
        assert paused is not None
        return paused

    def release(self, layer: str) -> None:
        """Say that a layer of `pause_before` is what it is to be: batches go through it from now on."""
        self._ahead.discard(layer)

    def kept_input(self, position: int, point: HookPoint) -> Tensor:
        """What a batch had at a point of `pause_before` on its way."""
        return self._kept[position][point]

    def leave(self, position: int) -> None:
        """Take a batch to the next block, whatever lies between."""
        self.position = position
        while not self._has_left[position]:
            self._resume(position)

    def finish(self) -> None:
        """Take all batches to the next block; at the last one, those whose outputs are asked for to its end."""
        calibrator = self._calibrator
        count = calibrator.outputs_for if calibrator.is_last(self.name) else len(self._entries)
        for position, _ in self.members:
            if position < count:
                self.leave(position)
            self._has_left[position] = True
        self._undo.close()

    def padding_mask(self, inputs: Tensor) -> Tensor | None:
        """As `padding_mask`, in the batch that runs."""
        return padding_mask(self._entries[self.position].owner_arguments, inputs, self.batches[self.position].inputs)

    def offload(self, position: int) -> None:
        """Say that a batch is not asked for again before its next layer."""
        paused = self._paused[position]
        self._calibrator.offloader.put([paused and paused.inputs, *self._kept[position].values()])

    def _resume(self, position: int) -> PausedForward | None:
        state = self._calibrator.resume(position)
        if isinstance(state, PausedForward):
            return state
        self._has_left[position], self.next_states[position], self._kept[position] = True, state, {}
        return None

    def _before_layer(self, layer: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._calibrator.in_forward():
            return
        if layer in self._ahead:
            self._calibrator.pause(PausedForward(layer, args[0], args[1:]))
        else:
            self.missed[layer] += args[0].shape[:-1].numel()

    def _keep(self, point: HookPoint, tensor: Tensor) -> None:
        if self._calibrator.in_forward():
            self._kept[self._calibrator.position][point] = tensor
