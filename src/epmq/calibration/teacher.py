"""Calibration batches, and the experts' own streams through their blocks beside the merged model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epmq.calibration.offload import Offloader
from epmq.calibration.sequential import Batch, BlockStep, SequentialCalibrator
from epmq.merging.experts import Sources
from epmq.models.heads import Head
from epmq.models.hooks import HookPoint, watch
from epmq.models.meta import hold_used_rows, load_outside, materialize, to_meta
from epmq.models.multitask import MultiTaskModel, NativeHead


@dataclass
class Calibration:
    """One task's calibration batches.

    Attributes:
        task: name of the task.
        batches: model inputs.
        head: puts the expert's head on a backbone; None where it has none.
    """

    task: str
    batches: list[Batch]
    head: Callable[[nn.Module], Head | NativeHead | None] = lambda backbone: None


def make_teachers(
    sources: Sources, calibration: Sequence[Calibration], device: torch.device, spill: Offloader | None = None
) -> dict[str, Teacher]:
    """A stream for every expert, if the recipe wants to know what the experts themselves compute.

    An expert that is the merged model, bit for bit, has none: its targets are plain GPTQ's.
    """
    settings = sources.recipe.quantize
    if not (settings.expert_features or settings.expert_stream or settings.adapt_heads):
        return {}
    outside = sources.outside_names()
    # Blocks first: nearly every expert differs there, and a large embedding need not be merged to see it.
    names = [*(name for name in sources.names if name not in outside), *outside]
    return {
        part.task: Teacher(sources, part, device, spill)
        for part in calibration
        if any(not torch.equal(sources.merged(name), sources.expert_tensor(part.task, name)) for name in names)
    }


class Teacher:
    """An expert on its own calibration batches, in lock-step with the walk of the merged model.

    Only the tensors outside its blocks stay in memory. It runs through each block once, with the block's weights in
    memory for just that long, and keeps what it was asked to.
    """

    def __init__(
        self, sources: Sources, calibration: Calibration, device: torch.device, spill: Offloader | None = None
    ) -> None:
        self.sources, self.task, self.device = sources, calibration.task, device
        self.model = sources.skeleton()
        names = hold_used_rows(self.model, sources.outside_names(), sources.tied, self._read, device)
        load_outside(self.model, names, self._read, device, sources.tied)
        self._calibration, self._scores = calibration, list[Tensor]()
        self._spill = spill or Offloader()
        self._steps = SequentialCalibrator(self.model, calibration.batches, self._conclude, spill).__iter__()
        self.step: BlockStep | None = None
        self._seen: list[dict[HookPoint, list[list[Tensor]]]] = []

    def _read(self, name: str) -> Tensor:
        return self.sources.expert_tensor(self.task, name)

    def run(self, block: str, places: Iterable[HookPoint]) -> None:
        """Run the block that the merged model is at on all batches, and keep what passes at some places.

        Args:
            block: its name.
            places: each as often as it will be taken.

        Raises:
            RuntimeError: the expert's next block is another one.
        """
        step = self.step = next(self._steps, None)
        if step is None:
            raise RuntimeError(f"expert {self.task} is at its end, the merged model at {block}")
        if step.name != block:
            raise RuntimeError(f"expert {self.task} is at block {step.name}, the merged model at {block}")
        materialize(self.model, self.sources.block_names(block), self._read, self.device)
        takes = Counter(places)
        for batch in range(len(self._calibration.batches)):
            seen: dict[HookPoint, list[Tensor]] = {place: [] for place in takes}
            with ExitStack() as stack:
                for place, found in seen.items():
                    stack.enter_context(watch(step.block, place, found.append))
                step.proceed(batch)
            self._spill.put(tensor for found in seen.values() for tensor in found)
            self._seen.append({place: [found] * takes[place] for place, found in seen.items()})
        to_meta(step.block)
        step.finish()

    def take(self, batch: int, place: HookPoint) -> list[Tensor]:
        """The tensors that passed at a place, in order, on a batch (its number among the expert's own)."""
        return list(self._seen[batch][place].pop())

    def advance(self) -> None:
        """End the block."""
        self.step, self._seen = None, []

    def close(self) -> None:
        """Let go of the batches that wait in the expert's forward; it runs no further."""
        self._steps.close()

    def scores(self) -> Tensor:
        """What the expert's head says to all its batches, once, after the last block: [examples, classes].

        Raises:
            RuntimeError: there are blocks left.
        """
        left = next(self._steps, None)
        if left is not None:
            raise RuntimeError(f"expert {self.task} is at block {left.name}, not at its end")
        return torch.cat(self._scores)

    def _conclude(self, batch: int) -> None:
        if batch == 0:
            self._head = self._calibration.head(self.model)
        if self._head is not None:
            model = MultiTaskModel(self.model, {self.task: self._head})
            self._scores.append(model(self.task, **self._calibration.batches[batch]))
