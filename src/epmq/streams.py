"""Calibration batches, and the experts' own streams through their blocks beside the merged model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmq.residual import Place, at
from epmq.skeleton import drop_tensors, hold_used_rows, load_block, load_embeddings
from epmq.sources import Sources
from epmq.walk import Batch, Step, Walk


@dataclass
class Calibration:
    """One task's calibration batches."""

    task: str
    batches: list[Batch]


def expert_streams(
    sources: Sources, calibration: Sequence[Calibration], device: torch.device
) -> dict[str, ExpertStream]:
    """A stream for every expert, if the recipe wants to know what the experts themselves compute.

    An expert that is the merged model, bit for bit, has none: its targets are plain GPTQ's.
    """
    settings = sources.recipe.quantize
    if not (settings.expert_features or settings.expert_stream):
        return {}
    outside = sources.outside_names()
    # Blocks first: nearly every expert differs there, and a large embedding need not be merged to see it.
    names = [*(name for name in sources.names if name not in outside), *outside]
    return {
        part.task: ExpertStream(sources, part, device)
        for part in calibration
        if any(not torch.equal(sources.merged(name), sources.expert_tensor(part.task, name)) for name in names)
    }


class ExpertStream:
    """An expert on its own calibration batches, in lock-step with the walk of the merged model.

    Only the tensors outside its blocks stay in memory; a block is there between `enter` and `leave`. A block may be
    entered more than once before `advance` ends it.
    """

    def __init__(self, sources: Sources, calibration: Calibration, device: torch.device) -> None:
        self.sources, self.task, self.device = sources, calibration.task, device
        self.model = sources.skeleton()
        rest = hold_used_rows(self.model, sources.outside_names(), sources.tied, self._read, device)
        rest = load_embeddings(self.model, rest, self._read, device)
        load_block(self.model, rest, self._read, device)
        sources.tie(self.model)
        self._steps = iter(Walk(self.model, calibration.batches))
        self.step: Step | None = None

    def _read(self, name: str) -> Tensor:
        return self.sources.expert_tensor(self.task, name)

    def enter(self, block: str) -> None:
        """Load the block that the merged model is at.

        Raises:
            RuntimeError: the expert's next block is another one.
        """
        if self.step is None:
            self.step = next(self._steps)
            self._outputs: list[Any] = []
        if self.step.name != block:
            raise RuntimeError(f"expert {self.task} is at block {self.step.name}, the merged model at {block}")
        load_block(self.model, self.sources.block_names(block), self._read, self.device)

    def run(self, batch: int, places: dict[Place, int], last: bool) -> dict[Place, list[Tensor]]:
        """Run the block on one batch: to its end if this is the last run, and else as far as is asked for.

        Args:
            batch: its number among the expert's own.
            places: where to listen, and how many tensors pass there.
            last: whether the block's output is to be kept for the next block.

        Returns:
            for each place the tensors that passed, in order.
        """
        assert self.step is not None
        seen: dict[Place, list[Tensor]] = {place: [] for place in places}
        with ExitStack() as stack:
            for place, found in seen.items():
                stack.enter_context(at(self.step.block, place, found.append))
            if last:
                self._outputs.append(self.step.run(batch))
            else:
                run_until(self.step, batch, places)
        return seen

    def leave(self) -> None:
        """Free the block's weights."""
        assert self.step is not None
        drop_tensors(self.step.block)

    def advance(self) -> None:
        """End the block: its outputs go to the next one."""
        assert self.step is not None
        self.step.finish(self._outputs)
        self.step = None


class _Enough(Exception):
    """Everything that was asked for has been computed: the rest of the block need not run."""


def run_until(step: Step, batch: int, places: dict[Place, int]) -> None:
    """Run a block on one batch until so many tensors have passed at each of the places."""
    left = dict(places)

    def count(place: Place) -> Callable[[Tensor], None]:
        def counted(_: Tensor) -> None:
            left[place] -= 1
            if not any(left.values()):
                raise _Enough

        return counted

    with ExitStack() as stack:
        stack.enter_context(suppress(_Enough))
        for place in places:
            stack.enter_context(at(step.block, place, count(place)))
        step.run(batch)
