"""Walk a model block by block on calibration batches, with the model's own code as the driver.

For every block the model's own forward runs up to that block: blocks that are finished give back the output stored
for the batch, and the block in question stops the forward and hands over the arguments it was called with. So every
argument beside the hidden state (masks, position bias, rotary embeddings, encoder states, whatever differs from
block to block) is exactly what the model would have passed, for every batch, and no architecture has to be listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import Stack, find_stacks, is_padding_mask
from epmq.replay import Replay

Batch = dict[str, Any]


class _Reached(Exception):
    """The forward has come to a block that is not finished."""

    def __init__(self, stack: Stack, index: int, args: tuple, kwargs: dict[str, Any], given: dict[str, Any]) -> None:
        self.stack, self.index, self.args_, self.kwargs, self.given = stack, index, args, kwargs, given


class Walk:
    """Steps through all blocks of a model.

    Args:
        model: the model in eval mode. Parameters outside the blocks must be real; a block's own may be on the meta
            device until the loop body for it runs.
        batches: model inputs, one dict a batch.
        conclude: called with the number of each batch when all blocks are finished: a forward of the model then costs
            no more than what lies outside of its blocks.

    `for step in Walk(model, batches)` yields a `Step` a block, in the order of the model's forward. The body loads
    the block, calls `step.run(i)` for each batch as often as it likes, changes the block, and ends with
    `step.finish()`, which runs the block once more on every batch and keeps its outputs for the next one.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], conclude: Callable[[int], None] | None = None
    ) -> None:
        self.model, self.batches, self.conclude = model, batches, conclude
        self.stacks = find_stacks(model)
        self.length = sum(len(stack.blocks) for stack in self.stacks)
        self._batch = 0
        self._arguments: dict[int, dict[str, Any]] = {}

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        done: dict[int, int] = {id(stack): 0 for stack in self.stacks}
        original = {block: block.forward for stack in self.stacks for block in stack.blocks}
        with ExitStack() as undo:
            undo.enter_context(uncached(self.model))
            for stack in self.stacks:
                undo.callback(self._listen(stack).remove)
                for index, block in enumerate(stack.blocks):
                    block.forward = self._pause(stack, index, done)  # type: ignore[method-assign]
                    undo.callback(block.__dict__.pop, "forward", None)
            for _ in range(self.length):
                reached = [self._drive(i) for i in range(len(self.batches))]
                stack, index = reached[0].stack, reached[0].index
                block = stack.blocks[index]
                paused, block.forward = block.forward, original[block]  # type: ignore[method-assign]
                step = Step(stack, index, [(r.args_, r.kwargs) for r in reached], [r.given for r in reached])
                yield step
                if not step.finished:
                    raise RuntimeError(f"{step.name}: the loop went on without finish()")
                block.forward = paused  # type: ignore[method-assign]
                done[id(stack)] = index + 1
            if self.conclude is not None:
                for batch in range(len(self.batches)):
                    self._batch = batch
                    self.conclude(batch)

    def _pause(self, stack: Stack, index: int, done: dict[int, int]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < done[id(stack)]:
                return stack.outputs[self._batch]
            raise _Reached(stack, index, args, kwargs, self._arguments[id(stack)])

        return forward

    def _listen(self, stack: Stack) -> Any:
        """Note what the stack's owner is called with: it is where padding masks are still what the user gave."""
        owner = _owner(self.model, stack, self.stacks)
        signature = inspect.signature(owner.forward)

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs).arguments
            self._arguments[id(stack)] = bound | bound.get("kwargs", {})

        return owner.register_forward_pre_hook(note, with_kwargs=True)

    def _drive(self, batch: int) -> _Reached:
        self._batch = batch
        try:
            self.model(**self.batches[batch])
        except _Reached as reached:
            return reached
        missing = ", ".join(stack.name for stack in self.stacks)
        raise ValueError(f"the forward of {type(self.model).__name__} ended before all blocks of {missing} were called")


def _owner(model: nn.Module, stack: Stack, stacks: Sequence[Stack]) -> nn.Module:
    """The outermost module that holds this stack and no other: T5's decoder, CLIP's text model, a whole BERT."""
    others = [other.name for other in stacks if other is not stack]
    parts = stack.name.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[:depth])
        if not any(other.startswith(name + "." if name else "") for other in others):
            return model.get_submodule(name)
    raise ValueError(f"{stack.name} lies inside another stack")


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Ask for no key–value cache: one would grow each time that a block runs on the same batch."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    asking = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for config in asking:
            config.use_cache = False
        yield
    finally:
        for config in asking:
            config.use_cache = True


class Step:
    """One block of a walk.

    Attributes:
        name: the block's name in the model.
        block: the module.
        calls: (args, kwargs) that the model passes to the block, one entry a batch.
        given: what the part of the model that holds the stack was called with, one entry a batch.
        batch: the batch that ran last, or runs.
    """

    def __init__(
        self,
        stack: Stack,
        index: int,
        calls: list[tuple[tuple, dict[str, Any]]],
        given: list[dict[str, Any]],
    ) -> None:
        self.stack, self.index, self.calls, self.given = stack, index, calls, given
        self.name, self.block = stack.block_name(index), stack.blocks[index]
        self.finished = False
        self.batch = 0
        self._replay = Replay(self.block)

    def run(self, batch: int) -> Any:
        """The block's output on one batch."""
        self.batch = batch
        self._replay.start(batch)
        args, kwargs = self.calls[batch]
        return self.block(*args, **kwargs)

    def settle(self, layers: Set[str]) -> None:
        """Say which layers of the block, by name, change no more before `finish`; see `epmq.replay`."""
        self._replay.settle(layers)

    def finish(self, outputs: list[Any] | None = None) -> None:
        """Keep the block's outputs on all batches for the next block; run it for them unless they are given."""
        self.stack.outputs = [self.run(i) for i in range(len(self.calls))] if outputs is None else outputs
        self._replay.close()
        self.finished = True

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Which tokens of a layer's inputs are real in the batch that runs: booleans [batch, tokens], or None if all.

        The stack's own padding mask, or the encoder's where the inputs are the encoder's output (cross-attention).
        Flattened inputs [batch·tokens, in] are recognised too.
        """
        given = self.given[self.batch]
        states = given.get("encoder_hidden_states")
        crossing = isinstance(states, Tensor) and states.data_ptr() == inputs.data_ptr()
        mask = given.get("encoder_attention_mask" if crossing else "attention_mask")
        if not isinstance(mask, Tensor) or not is_padding_mask(mask):
            return None
        if tuple(mask.shape) == tuple(inputs.shape[:-1]) or (inputs.ndim == 2 and mask.numel() == len(inputs)):
            return mask.bool()
        return None
