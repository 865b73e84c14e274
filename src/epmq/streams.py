"""Calibration batches, and the experts' own streams through their blocks beside the merged model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import hooks
from epmq.skeleton import drop_tensors, load_block, load_embeddings
from epmq.sources import Sources
from epmq.walk import Batch, Walk


@dataclass
class Calibration:
    """One task's calibration batches."""

    task: str
    batches: list[Batch]


def expert_streams(
    sources: Sources, calibration: Sequence[Calibration], device: torch.device
) -> dict[str, ExpertStream]:
    """A stream for every expert, if the recipe wants the experts' own layer inputs.

    An expert that is the merged model, bit for bit, has none: its targets are plain GPTQ's.
    """
    if not sources.recipe.quantize.expert_features:
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

    Only the tensors outside its blocks stay in memory; a block is there between `enter` and `leave`.

    Attributes:
        inputs: what `run` saw: for each layer asked for, its inputs in the order of its calls.
    """

    def __init__(self, sources: Sources, calibration: Calibration, device: torch.device) -> None:
        self.sources, self.task, self.device = sources, calibration.task, device
        self.model = sources.skeleton()
        rest = load_embeddings(self.model, sources.outside_names(), self._read, device)
        load_block(self.model, rest, self._read, device)
        sources.tie(self.model)
        self._steps = iter(Walk(self.model, calibration.batches))
        self.inputs: dict[str, list[Tensor]] = {}

    def _read(self, name: str) -> Tensor:
        return self.sources.expert_tensor(self.task, name)

    def enter(self, block: str, layers: list[str]) -> None:
        """Load the next block, and listen to the named layers of it.

        Raises:
            RuntimeError: the expert's next block is not the merged model's.
        """
        self.step = next(self._steps)
        if self.step.name != block:
            raise RuntimeError(f"expert {self.task} is at block {self.step.name}, the merged model at {block}")
        load_block(self.model, self.sources.block_names(block), self._read, self.device)
        self._layers = layers
        self._outputs: list[Any] = []

    def run(self, batch: int) -> None:
        """Run the block on one batch and keep its output and what its layers saw."""
        self.inputs = {name: [] for name in self._layers}
        with hooks([(self.step.block.get_submodule(name), self._listen(name)) for name in self._layers]):
            self._outputs.append(self.step.run(batch))

    def _listen(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs[name].append(args[0])

        return keep

    def leave(self) -> None:
        """End the block: its outputs go to the next one, its weights are freed."""
        self.step.finish(self._outputs)
        drop_tensors(self.step.block)
        self.inputs = {}
