"""SequentialCalibrator a model block by block on calibration batches, with the model's own code as the driver.

Every batch has a forward of the model to itself, and all these forwards go side by side: each waits at the entry of
the block that the walk is at, and inside of it before whichever layer it is asked to wait. So every layer runs once on
every batch, every argument beside the hidden state (masks, position bias, rotary embeddings, encoder states, whatever
differs from block to block) is exactly what the model passes, and no architecture has to be listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from epmq.calibration.offload import Offloader
from epmq.errors import InputError
from epmq.models.blocks import Stack, find_stacks, is_padding_mask
from epmq.models.hooks import HookPoint, watch, without_cache

Batch = dict[str, Any]


@dataclass
class Entry:
    """A forward waits at the entry of a block, which it is about to call with these arguments.

    Attributes:
        given: what the part of the model that holds the block's stack was called with.
    """

    stack: Stack
    index: int
    args: tuple
    kwargs: dict[str, Any]
    given: dict[str, Any]


@dataclass
class PausedForward:
    """A forward waits before a layer of the block, which it is about to call on these inputs."""

    layer: str
    inputs: Tensor


class SequentialCalibrator:
    """Steps through all blocks of a model.

    Args:
        model: the model in eval mode. Parameters outside the blocks must be real; a block's own may be on the meta
            device until the loop body for it runs.
        batches: model inputs, one dict a batch.
        conclude: called with the number of each batch when all blocks are finished: a forward of the model then costs
            no more than what lies outside of its blocks.
        spill: takes what batches hold while they wait.
        shown: how many batches, from the first on, the last block is asked to give its output on; None for all. The
            others stay before the last layers that they are taken to. Without `conclude` only.

    `for step in SequentialCalibrator(model, batches)` yields a `BlockStep` a block, in the order of the model's
    forward. The body loads the block, tries it (`step.run`), takes the batches from layer to layer (`step.reach`) while
    it changes the layers that lie ahead, and ends with `step.finish()`, which takes all batches to the next block.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        conclude: Callable[[int], None] | None = None,
        spill: Offloader | None = None,
        shown: int | None = None,
    ) -> None:
        self.shown = len(batches) if shown is None or conclude is not None else shown
        self.model, self.batches, self.conclude, self.spill = model, batches, conclude, spill or Offloader()
        self.stacks = find_stacks(model)
        self.length = sum(len(stack.blocks) for stack in self.stacks)
        self.batch = 0
        self._arguments: list[dict[str, dict[str, Any]]] = []
        self._passed: list[int] = []
        self._forwards: list[greenlet] = []

    def __iter__(self) -> Generator[BlockStep, None, None]:
        count = len(self.batches)
        self._passed, self._arguments = [0] * count, [{} for _ in self.batches]
        for stack in self.stacks:
            stack.outputs = [None] * count
        with ExitStack() as undo:
            undo.enter_context(without_cache(self.model))
            for stack in self.stacks:
                undo.callback(self._listen(stack).remove)
                for index, block in enumerate(stack.blocks):
                    block.forward = self._entered(stack, index, block.forward)  # type: ignore[method-assign]
                    undo.callback(block.__dict__.pop, "forward", None)
                    undo.callback(block.register_forward_hook(self._left(stack, index)).remove)
            self._forwards = [greenlet(self._forward) for _ in self.batches]
            undo.callback(self._end)
            reached = [self.resume(batch) for batch in range(count)]
            for _ in range(self.length):
                step = BlockStep(self, reached)
                yield step
                if not step.finished:
                    raise RuntimeError(f"{step.name}: the loop went on without finish()")
                reached = step.left
                del step  # and with it the blocks' inputs
            self._end()
            if self.conclude is not None:
                self._give_back()
                for self.batch in range(count):
                    self.conclude(self.batch)

    def resume(self, batch: int) -> Entry | PausedForward | None:
        """Let the forward of a batch go on until it waits again; None when it has left the last block.

        Raises:
            ValueError: it ended before all blocks were called.
        """
        self.batch = batch
        # Grad mode is the thread's: it must be what it was when another forward or the caller goes on.
        with torch.no_grad():
            reached = self._forwards[batch].switch()
        if isinstance(reached, Entry):
            self.spill.put([*reached.args, *reached.kwargs.values()])
        if reached is None and self._passed[batch] < self.length:
            missing = ", ".join(stack.name for stack in self.stacks)
            kind = type(self.model).__name__
            raise InputError(f"the forward of {kind} ended before all blocks of {missing} were called")
        return reached

    def at_last_block(self) -> bool:
        """Whether no block lies ahead of any batch but the one that it is in."""
        return min(self._passed) >= self.length - 1

    def waits(self) -> bool:
        """Whether the code that asks is a batch's forward, not a call from outside."""
        return bool(self._forwards) and getcurrent() is self._forwards[self.batch]

    def _forward(self) -> None:
        self.model(**self.batches[self.batch])

    def _entered(self, stack: Stack, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.waits():
                given = self._arguments[self.batch][stack.name]
                getcurrent().parent.switch(Entry(stack, index, args, kwargs, given))  # type: ignore[union-attr]
            return original(*args, **kwargs)

        return forward

    def _left(self, stack: Stack, index: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if not self.waits():
                return
            self._passed[self.batch] += 1
            if index == len(stack.blocks) - 1:
                stack.outputs[self.batch] = output
            if self._passed[self.batch] == self.length:
                getcurrent().parent.switch(None)  # type: ignore[union-attr]  # what follows is not asked for

        return leave

    def _give_back(self) -> None:
        """Let every block give what the last of its stack gave on the batch."""
        for stack in self.stacks:
            for block in stack.blocks:
                block.forward = lambda *args, stack=stack, **kwargs: stack.outputs[self.batch]  # type: ignore[method-assign]

    def _end(self) -> None:
        for forward in self._forwards:
            forward.throw()
        self._forwards = []

    def _listen(self, stack: Stack) -> Any:
        """Note what the stack's owner is called with: it is where padding masks are still what the user gave."""
        owner = _owner(self.model, stack, self.stacks)
        signature = inspect.signature(owner.forward)

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs).arguments
            self._arguments[self.batch][stack.name] = bound | bound.get("kwargs", {})

        return owner.register_forward_pre_hook(note, with_kwargs=True)


def _owner(model: nn.Module, stack: Stack, stacks: Sequence[Stack]) -> nn.Module:
    """The outermost module that holds this stack and no other: T5's decoder, CLIP's text model, a whole BERT."""
    others = [other.name for other in stacks if other is not stack]
    parts = stack.name.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[:depth])
        if not any(other.startswith(name + "." if name else "") for other in others):
            return model.get_submodule(name)
    raise InputError(f"{stack.name} lies inside another stack")


class BlockStep:
    """One block of a walk.

    Attributes:
        name: the block's name in the model.
        block: the module.
        left: where each batch waits once it has left the block.
    """

    def __init__(self, walk: SequentialCalibrator, reached: list[Any]) -> None:
        self._walk, self._entries, self._stops = walk, reached, list[PausedForward | None]([None] * len(reached))
        self.stack, self.index = reached[0].stack, reached[0].index
        self.name, self.block = self.stack.block_name(self.index), self.stack.blocks[self.index]
        self.left: list[Entry | PausedForward | None] = [None] * len(reached)
        self._gone = [False] * len(reached)
        self._seen: list[dict[HookPoint, Tensor]] = [{} for _ in reached]
        self._ahead: set[str] = set()
        self._undo = ExitStack()
        self.batch = 0

    @property
    def finished(self) -> bool:
        """Whether all batches have left the block."""
        return all(self._gone)

    @torch.no_grad()
    def run(self, batch: int) -> Any:
        """The block's output on one batch, as the block is now. The batch's forward stays where it is."""
        self.batch = batch
        entry = self._entries[batch]
        return self.block(*entry.args, **entry.kwargs)

    def stop_at(self, layers: Sequence[str], keep: Iterable[str] = ()) -> None:
        """Say before which layers every batch is to wait, and what is to be kept of each batch on its way (`seen`).

        Raises:
            RuntimeError: it has been said before.
        """
        if self._ahead:
            raise RuntimeError(f"{self.name}: batches are under way")
        self._ahead = set(layers)
        for layer in layers:
            hook = self.block.get_submodule(layer).register_forward_pre_hook(self._stop(layer))
            self._undo.callback(hook.remove)
        for place in keep:
            self._undo.enter_context(watch(self.block, place, lambda tensor, place=place: self._keep(place, tensor)))  # type: ignore[misc]

    def reach(self, batch: int, layer: str) -> Tensor | None:
        """Take a batch to a layer of `stop_at`; layers before it must be what they are to be.

        Returns:
            the layer's inputs; None if the batch does not come by it.
        """
        self.batch = batch
        stop = self._stops[batch]
        while not self._gone[batch] and (stop is None or stop.layer not in self._ahead):
            stop = self._stops[batch] = self._resume(batch)
        return stop.inputs if stop is not None and stop.layer == layer else None

    def passed(self, layer: str) -> None:
        """Say that a layer of `stop_at` is what it is to be: batches go through it from now on."""
        self._ahead.discard(layer)

    def seen(self, batch: int, place: HookPoint) -> Tensor:
        """What a batch had at a place of `stop_at` on its way."""
        return self._seen[batch][place]

    def proceed(self, batch: int) -> None:
        """Take a batch to the next block, whatever lies between."""
        self.batch = batch
        while not self._gone[batch]:
            self._resume(batch)

    def finish(self) -> None:
        """Take all batches to the next block; at the last one, those that are to be shown to its end."""
        count = self._walk.shown if self._walk.at_last_block() else len(self._entries)
        for batch in range(count):
            self.proceed(batch)
        self._gone[count:] = [True] * (len(self._gone) - count)
        self._undo.close()

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Which tokens of a layer's inputs are real in the batch that runs: booleans [batch, tokens], or None if all.

        The stack's own padding mask, or the encoder's where the inputs are the encoder's output (cross-attention).
        Flattened inputs [batch·tokens, in] are recognised too.
        """
        given = self._entries[self.batch].given
        states = given.get("encoder_hidden_states")
        crossing = isinstance(states, Tensor) and states.data_ptr() == inputs.data_ptr()
        mask = given.get("encoder_attention_mask" if crossing else "attention_mask")
        if not isinstance(mask, Tensor) or not is_padding_mask(mask):
            return None
        if tuple(mask.shape) == tuple(inputs.shape[:-1]) or (inputs.ndim == 2 and mask.numel() == len(inputs)):
            mask = mask.bool()
            return None if bool(mask.all()) else mask
        return None

    def rest(self, batch: int) -> None:
        """Say that a batch is not asked for again before its next layer."""
        stop = self._stops[batch]
        self._walk.spill.put([stop and stop.inputs, *self._seen[batch].values()])

    def _resume(self, batch: int) -> PausedForward | None:
        reached = self._walk.resume(batch)
        if isinstance(reached, PausedForward):
            return reached
        self._gone[batch], self.left[batch], self._seen[batch] = True, reached, {}
        return None

    def _stop(self, layer: str) -> Callable[..., None]:
        def wait(module: nn.Module, args: tuple) -> None:
            if layer in self._ahead and self._walk.waits():
                getcurrent().parent.switch(PausedForward(layer, args[0]))  # type: ignore[union-attr]

        return wait

    def _keep(self, place: HookPoint, tensor: Tensor) -> None:
        if self._walk.waits():
            self._seen[self._walk.batch][place] = tensor
