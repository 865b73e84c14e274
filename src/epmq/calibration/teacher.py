"""The experts as teachers: each goes through its own blocks beside the merged model's, and tells what it computes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

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
from epmq.models.mixtures import Mixture, mixtures
from epmq.models.multitask import MultiTaskModel, NativeHead

# Puts an expert's head on a backbone; gives None where it has none that can be built.
MakeHead = Callable[[nn.Module], Head | NativeHead | None]
# Every block is called once.
NO_CALLS = BlockCalls()


class Teacher:
    """An expert on its own calibration batches, in lock-step with the merged model.

    Only the tensors outside its blocks stay in memory. It runs through each block once, with the block's weights in
    memory for just that long, and keeps what it was asked to. In a block with a mixture it waits before that, until it
    is told what the merged model's router has chosen (`follow`): so that each of the mixture's experts sees the same
    tokens in both. Batches and head are those of its task; the layers `outside` are its last step, as in
    `SequentialCalibrator`.
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
        self._mixture: str | None = None  # before which all batches wait
        self._undo = ExitStack()
        self._routes: Mapping[int, tuple[Any, ...]] = {}

    def run(self, block: str, points: Iterable[HookPoint]) -> None:
        """Run the block that the merged model is at on all batches, and keep what passes at some points.

        Points are given as often as each will be taken. A block with a mixture is run up to that.

        Raises:
            RuntimeError: the expert's next block is another one.
        """
        names: Sequence[str] = self._calls.order if self._calls.repeated else [block] if block else []
        self._mixture = None if self._calls.repeated or not block else self._only_mixture(block)
        with self._loaded(names):  # where blocks are called repeatedly, the way to the next step runs them
            step = self.step = next(self._steps, None)
            if step is None or step.name != block:
                at = "its end" if step is None else f"block {step.name}"
                raise RuntimeError(f"expert {self.task} is at {at}, the merged model at {block}")
            if isinstance(step, BlockStep) and self._mixture is not None:
                step.pause_before([self._mixture])
                self._undo.enter_context(step.block.get_submodule(self._mixture).register_forward_pre_hook(self._route))
            for position, _ in step.members:
                self._kept[position] = {point: [[]] * count for point, count in Counter(points).items()}
                self._keep(step, position)
        if self._mixture is None:
            step.finish()

    def _only_mixture(self, block: str) -> str | None:
        """The mixture in a block, by its name there; None where there is none, or several."""
        found = dict(self.model.named_modules()).get(block)
        names = [] if found is None else list(mixtures(found))
        return names[0] if len(names) == 1 else None

    def follow(self, mixture: str, routes: Mapping[int, tuple[Any, ...]]) -> None:
        """Run the rest of a block, from a mixture on that it waits before; else it has gone by its own router.

        Args:
            mixture: its name within the block.
            routes: experts and weights, [tokens, k] each, that the merged model's router has chosen, batch by batch.
        """
        step = self.step
        if not isinstance(step, BlockStep) or self._mixture != mixture:
            return
        self._mixture, self._routes = None, routes
        with self._loaded([step.name]):
            step.release(mixture)
            for position, _ in step.members:
                self._keep(step, position)
        self._routes = {}
        self._undo.close()
        step.finish()

    def _route(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """As a forward pre-hook of a mixture: let it do what the merged model's router has chosen."""
        assert isinstance(self.step, BlockStep)
        routes = self._routes.get(self.step.position)
        return None if routes is None else (args[0], *routes)

    @contextmanager
    def _loaded(self, blocks: Iterable[str]) -> Iterator[None]:
        """The expert's weights of some blocks in memory for the length of a `with` block; a mixture's when it runs."""
        for block in blocks:
            later = f"{block}.{self._mixture}." if self._mixture is not None else None
            names = [name for name in self._experts.block_names(block) if later is None or not name.startswith(later)]
            materialize(self.model, names, self._expert.tensor, self._device)
        yield
        for name in blocks:
            to_meta(self.model.get_submodule(name))

    def _keep(self, step: BlockStep | OutsideStep, position: int) -> None:
        """Run a block on a batch, or up to the mixture that it waits before, and keep what passes at some points."""
        passed: dict[HookPoint, list[Tensor]] = {point: [] for point in self._kept[position]}
        with ExitStack() as stack:
            for point, passing in passed.items():
                if point is None or not isinstance(step.block.get_submodule(point), Mixture):
                    stack.enter_context(watch(step.block, point, passing.append))
            if self._mixture is not None and isinstance(step, BlockStep):
                inputs = step.run_until(position, self._mixture)
                if inputs is not None and self._mixture in passed:
                    passed[self._mixture].append(inputs)
            else:
                step.leave(position)
        self._offloader.put(tensor for passing in passed.values() for tensor in passing)
        for point, passing in passed.items():
            for kept in self._kept[position][point][:1]:
                kept += passing

    def take(self, index: int, point: HookPoint) -> list[Tensor]:
        """The tensors that passed at a point, in order, on one of the expert's own batches."""
        if self._mixture is not None and not self._kept[index][point][-1]:  # it comes after the mixture
            self.follow(self._mixture, {})
        return list(self._kept[index][point].pop())

    def end_block(self) -> None:
        """Let go of what was kept of the block; where it still waits before a mixture, it goes by its own router."""
        if self._mixture is not None:
            self.follow(self._mixture, {})
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
