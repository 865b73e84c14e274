"""Calibrate a model that calls its blocks again and again, such as ALBERT, on all of the calls.

Here no forward can wait until a block is solved: its later calls read what the earlier ones gave. So the whole model is
in memory, and a step is one block in it: whoever tries the block on a batch runs the model, with the weights there are,
and sees every call.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from epmq.calibration.calls import BlockCalls
from epmq.calibration.masks import padding_mask
from epmq.calibration.offload import Offloader
from epmq.calibration.outside import OutsideStep
from epmq.calibration.sequential import Batch, BlockStep, SequentialCalibrator
from epmq.models.hooks import without_cache


def calibrator_of(
    model: nn.Module,
    batches: Sequence[Batch],
    calls: BlockCalls,
    on_finished: Callable[[Batch], None] | None = None,
    offloader: Offloader | None = None,
    outputs_for: int | None = None,
    outside: Sequence[str] = (),
) -> SequentialCalibrator:
    """What goes through the blocks of a model that calls them so; arguments as in `SequentialCalibrator`."""
    kind = RepeatedCalibrator if calls.repeated else SequentialCalibrator
    return kind(model, batches, on_finished, offloader, outputs_for, calls.order, outside)


class RepeatedCalibrator(SequentialCalibrator):
    """Steps through the blocks of a model whose weights are all there, in the order of their first calls."""

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Stack → those of its owner, in the forward that ran last."""
        return self._owner_arguments[self.position]

    def __iter__(self) -> "Generator[BlockStep | OutsideStep, None, None]":
        self._owner_arguments = [{} for _ in self.batches]
        with ExitStack() as undo:
            undo.enter_context(without_cache(self.model))
            for stack in self.stacks:
                undo.enter_context(self._record_arguments(stack))
            for name in self._order:
                yield RepeatedStep(self, name)
            self._take_output()
            yield from self._after_blocks()

    def run(self, position: int) -> None:
        """Run the model on a batch, up to its output layer."""
        self.run_outside(position)

    def _take_output(self) -> None:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.first_output = output

        with ExitStack() as hooks:
            for name in self._order:
                hooks.enter_context(self.model.get_submodule(name).register_forward_hook(note))
            self.run(0)


class RepeatedStep(BlockStep):
    """One block, with all batches; trying it on a batch runs the model, and with it the block at every call."""

    lockstep = False

    def __init__(self, calibrator: RepeatedCalibrator, name: str) -> None:
        super().__init__(calibrator, name, list(range(len(calibrator.batches))))
        self._model = calibrator

    def run(self, position: int) -> None:
        self._model.run(position)

    def leave(self, position: int) -> None:
        self._model.run(position)

    def finish(self) -> None:
        """Nothing waits."""

    def offload(self, position: int) -> None:
        """Nothing waits."""

    def padding_mask(self, inputs: Tensor) -> Tensor | None:
        arguments, given = self._model.arguments, self.batches[self._model.position].inputs
        return padding_mask(arguments[self.stack.name], inputs, given) if self.stack.name in arguments else None
