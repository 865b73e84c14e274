"""The experts as teachers: each goes through its own blocks beside the merged model's, and tells what it computes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from epmq.calibration.calls import BlockCalls
from epmq.calibration.offload import Offloader
from epmq.calibration.outside import OutsideStep
from epmq.calibration.repeated import calibrator_of
from epmq.calibration.sequential import Batch, BlockStep
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import ExpertReader, TensorReader
from epmq.models.heads import Head
from epmq.models.hooks import HookPoint, watch
from epmq.models.meta import hold_used_rows, load_outside, materialize, to_meta
from epmq.models.multitask import MultiTaskModel, NativeHead

# Puts an expert's head on a backbone; gives None where it has none that can be built.
MakeHead = Callable[[nn.Module], Head | NativeHead | None]
# Every block is called once.
NO_CALLS = BlockCalls()


class Teacher:
    """An expert on its own calibration batches, in lock-step with the merged model.

    Only the tensors outside its blocks stay in memory. It runs through each block once, with the block's weights in
    memory for just that long, and keeps what it was asked to. Batches and head are those of its task; the layers
    `outside` are its last step, as in `SequentialCalibrator`.
    """

    def __init__(
        self,
        experts: ExpertSet,
        expert: ExpertReader,
        batches: Sequence[Batch],
        make_head: MakeHead,
        device: torch.device,
        offloader: Offloader | None = None,
        calls: BlockCalls = NO_CALLS,
        outside: Sequence[str] = (),
    ) -> None:
        self._experts, self._expert, self._device, self._calls = experts, expert, device, calls
        self.task, self.model = expert.task, experts.meta_model()
        names = hold_used_rows(self.model, experts.outside_names(), experts.tied, expert.tensor, device)
        load_outside(self.model, names, expert.tensor, device, experts.tied)
        self._batches, self._make_head = batches, make_head
        self._head: Head | NativeHead | None = None
        self._scores: list[Tensor] = []
        self._offloader = offloader or Offloader()
        self._steps = iter(calibrator_of(self.model, batches, calls, self._score, offloader, outside=outside))
        self.step: BlockStep | OutsideStep | None = None
        self._kept: dict[int, dict[HookPoint, list[list[Tensor]]]] = {}

    def run(self, block: str, points: Iterable[HookPoint]) -> None:
        """Run the block that the merged model is at on all batches, and keep what passes at some points.

        Points are given as often as each will be taken.

        Raises:
            RuntimeError: the expert's next block is another one.
        """
        names: Sequence[str] = self._calls.order if self._calls.repeated else [block] if block else []
        with self._loaded(names):  # where blocks are called repeatedly, the way to the next step runs them
            step = self.step = next(self._steps, None)
            if step is None or step.name != block:
                at = "its end" if step is None else f"block {step.name}"
                raise RuntimeError(f"expert {self.task} is at {at}, the merged model at {block}")
            for position, _ in step.members:
                self._keep(step, position, Counter(points))
        step.finish()

    @contextmanager
    def _loaded(self, blocks: Iterable[str]) -> Iterator[None]:
        """The expert's weights of some blocks in memory for the length of a `with` block."""
        for name in blocks:
            materialize(self.model, self._experts.block_names(name), self._expert.tensor, self._device)
        yield
        for name in blocks:
            to_meta(self.model.get_submodule(name))

    def _keep(self, step: BlockStep | OutsideStep, position: int, takes: Mapping[HookPoint, int]) -> None:
        """Run a block on a batch, and keep what passes at some points, as often as it will be taken."""
        tensors: dict[HookPoint, list[Tensor]] = {point: [] for point in takes}
        with ExitStack() as stack:
            for point, passing in tensors.items():
                stack.enter_context(watch(step.block, point, passing.append))
            step.leave(position)
        self._offloader.put(tensor for passing in tensors.values() for tensor in passing)
        self._kept[position] = {point: [passing] * takes[point] for point, passing in tensors.items()}

    def take(self, index: int, point: HookPoint) -> list[Tensor]:
        """The tensors that passed at a point, in order, on one of the expert's own batches."""
        return list(self._kept[index][point].pop())

    def end_block(self) -> None:
        """Let go of what was kept of the block."""
        self.step, self._kept = None, {}

    def close(self) -> None:
        """Let go of the batches that wait in the expert's forward; it runs no further."""
        self._steps.close()

    def scores(self) -> list[Tensor]:
        """What the expert's head says to its batches, one by one, once, after the last block: [..., classes].

        Raises:
            RuntimeError: there are blocks left.
        """
        with self._loaded(self._calls.order if self._calls.repeated else []):
            step = next(self._steps, None)
        if step is not None:
            raise RuntimeError(f"expert {self.task} is at block {step.name}, not at its end")
        return self._scores

    def _score(self, batch: Batch) -> None:
        if batch.index == 0:
            self._head = self._make_head(self.model)
        if self._head is not None:
            model = MultiTaskModel(self.model, {self.task: self._head})
            self._scores.append(model(self.task, **batch.inputs))


def equals_merge(experts: ExpertSet, expert: ExpertReader, merged: TensorReader) -> bool:
    """Whether an expert is the merged model, bit for bit: then it has nothing to teach, and targets are GPTQ's."""
    outside = experts.outside_names()
    # Blocks first: nearly every expert differs there, and a large embedding need not be merged to see it.
    names = [*(name for name in experts.names if name not in outside), *outside]
    return all(torch.equal(merged.tensor(name), expert.tensor(name)) for name in names)
