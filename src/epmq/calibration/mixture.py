"""Mixtures of experts: the layers of each expert are calibrated on the tokens that the merged model's router sends it.

All batches wait before the mixture, with what its router has chosen, while one expert after the other is solved: its
first layers on the tokens that it gets, its last layer on what those then give. So no layer runs more than once for
that, and one expert's moments are in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from epmq.calibration.collect import InputCollector, LayerGroup
from epmq.calibration.context import CalibrationContext
from epmq.calibration.grouping import LayerTarget
from epmq.calibration.outside import OutsideStep
from epmq.calibration.sequential import Batch, BlockStep
from epmq.calibration.teacher import Teacher
from epmq.calibration.tiles import TiledLayer, layer_group
from epmq.errors import error_context
from epmq.merging.readers import ExpertReader
from epmq.models.hooks import HookPoint
from epmq.models.mixtures import mixtures
from epmq.models.storage import join
from epmq.quantization.hessian import Moments

# An expert that sees fewer tokens than this share of its inputs is solved on others of its mixture beside its own.
FEWEST = 0.25
# How many others, for each of its inputs.
OTHERS = 2


class RoutedTokens:
    """The tokens that wait before a mixture, and which experts they go to; all batches are taken there.

    Args:
        name: of the mixture, within the block.
        points: where the experts' own values are asked for in the block, as in `collect`.
    """

    def __init__(self, step: BlockStep, name: str, context: CalibrationContext, points: Sequence[HookPoint]) -> None:
        self._step, self._name, self._context = step, name, context
        self.mixture: Any = step.block.get_submodule(name)
        self._members: list[tuple[int, Batch]] = []
        self._sorted: dict[int, tuple[Tensor, list[int]]] = {}  # position → tokens by expert, and where each ends
        self._real: dict[int, Tensor] = {}  # position → the tokens that are no padding
        self._theirs: dict[int, Tensor] = {}  # position → what the task's own expert has there
        for task, batches in groupby(step.members, key=lambda member: member[1].task):
            teacher = context.teachers.get(task)
            if teacher is not None and teacher.step is None:
                teacher.run(step.name, points)
            for position, batch in batches:
                self._arrive(position, batch, teacher if name in points else None)

    def _arrive(self, position: int, batch: Batch, teacher: Teacher | None) -> None:
        """Take a batch to the mixture."""
        inputs = self._step.run_until(position, self._name)
        if inputs is None:
            return
        self._members.append((position, batch))
        chosen, mask = self._step.waiting(position).others[0], self._step.padding_mask(inputs)
        real = torch.arange(len(chosen), device=chosen.device)
        real = self._real[position] = real if mask is None else real[mask.reshape(-1)]
        flat, order = chosen[real].reshape(-1).sort(stable=True)
        ends = torch.bincount(flat, minlength=self.mixture.count).cumsum(0)
        self._sorted[position] = real[order // chosen.shape[1]], ends.tolist()
        if teacher is not None:
            passed = teacher.take(batch.index, self._name)
            if len(passed) == 1 and passed[0].shape == inputs.shape:
                self._theirs[position] = passed[0]
        self._step.offload(position)

    def tokens(self, position: int, expert: int) -> Tensor:
        """Which tokens of a batch go to an expert, without padding, in order."""
        tokens, ends = self._sorted[position]
        return tokens[ends[expert - 1] if expert else 0 : ends[expert]]

    @torch.no_grad()
    def groups(self, names: Sequence[str]) -> Iterator[LayerGroup | TiledLayer]:
        """Of each expert the layers that share an input, with all that is collected for them.

        The next ones see what these are then.

        Args:
            names: of the layers within the block that are to be solved.
        """
        solved = set(names)
        for expert in range(self.mixture.count):
            path = f"{self._name}.{expert}"
            for last in (False, True):
                layers = ("down_proj",) if last else ("gate_proj", "up_proj")
                own = [name for layer in layers if (name := f"{path}.{layer}") in solved]
                if own:
                    group = layer_group(self._context, self._step, LayerTarget(own, waits=False, routed=True))
                    self._collect(group, expert, last)
                    yield group

    def _collect(self, group: LayerGroup | TiledLayer, expert: int, last: bool) -> None:
        """Collect the objective of the first or the last layers of an expert, task by task."""
        context, others = self._context, self._others(expert)
        for task, batches in groupby(self._members, key=lambda member: member[1].task):
            moments = Moments(group.columns, group.device, context.guidance.off_diagonal)
            collector = InputCollector(self._step, group, moments, None, context.guidance.own_inputs)
            inner = self._inner(expert) if last else _same
            theirs_inner = self._inner(expert, context.experts.experts[task]) if last and self._theirs else _same
            seen = 0
            for position, _ in batches:
                seen += len(self._real[position])
                rows = others(position)
                inputs, theirs = (
                    self._step.waiting(position).inputs,
                    self._theirs.get(position) if group.features else None,
                )
                if len(rows):
                    collector.add(inner(inputs[rows]), None if theirs is None else theirs_inner(theirs[rows]))
                    group.pooled += len(rows) - len(self.tokens(position, expert))
            if moments.count:
                with error_context(f"{group.layers[0]}, task {task}"):
                    group.add_task(task, moments, aims=False, share=moments.count / seen)

    def _others(self, expert: int) -> Callable[[int], Tensor]:
        """Which tokens of a batch an expert is solved on: those that it gets and, where they are too few, others."""
        own = sum(len(self.tokens(position, expert)) for position, _ in self._members)
        columns = self.mixture.experts[expert].up_proj.weight.shape[1]
        if own >= FEWEST * columns:
            return lambda position: self.tokens(position, expert)
        total = sum(len(real) for real in self._real.values())
        step = max(1, total // max(1, OTHERS * columns))
        return lambda position: torch.cat([self.tokens(position, expert), self._real[position][::step]]).unique()

    def _inner(self, expert: int, reader: ExpertReader | None = None) -> Callable[[Tensor], Tensor]:
        """What the last layer of an expert receives: in the merged model as it is now, or in a task's own expert."""
        layers: Any = self.mixture.experts[expert]
        if reader is not None:
            path = join(self._step.name, f"{self._name}.{expert}")
            layers = SimpleNamespace(
                **{name: _linear(reader, f"{path}.{name}", layer) for name, layer in layers.named_children()}
            )
        return lambda inputs: self.mixture.inner(layers, inputs.float())

    def go_on(self) -> None:
        """Let the batches through, and the tasks' own experts with them."""
        lead(self._step, self._name, self._members, self._context.teachers)
        self._step.release(self._name)


def _same(inputs: Tensor) -> Tensor:
    return inputs


def _linear(reader: ExpertReader, name: str, like: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer of a task's own expert, of that name, in the dtype and on the device of the merged model's."""
    weight = reader.tensor(f"{name}.weight").to(like.weight)
    bias = None if like.bias is None else reader.tensor(f"{name}.bias").to(like.bias)
    return lambda inputs: functional.linear(inputs, weight, bias)


def lead(step: BlockStep, mixture: str, members: Sequence[tuple[int, Batch]], teachers: Mapping[str, Teacher]) -> None:
    """Take the tasks' own experts past a mixture with what the merged model's router has chosen for the same tokens."""
    for task, batches in groupby(members, key=lambda member: member[1].task):
        if teacher := teachers.get(task):
            teacher.follow(mixture, {batch.index: step.waiting(position).others for position, batch in batches})


def pass_block(step: BlockStep | OutsideStep, teachers: Mapping[str, Teacher]) -> None:
    """Take the experts of all tasks, by task, past a block in which they are asked nothing."""
    for task in dict.fromkeys(batch.task for _, batch in step.members):
        if task in teachers:
            teachers[task].run(step.name, ())
    if teachers:
        _follow_routes(step, teachers)
    for teacher in teachers.values():
        teacher.end_block()


def _follow_routes(step: BlockStep | OutsideStep, teachers: Mapping[str, Teacher]) -> None:
    """As `lead`, of a block that an earlier run has finished, whose weights are there already."""
    names = list(mixtures(step.block)) if isinstance(step, BlockStep) and step.lockstep else []
    if isinstance(step, BlockStep) and len(names) == 1:
        step.pause_before(names)
        lead(step, names[0], [one for one in step.members if step.run_until(one[0], names[0]) is not None], teachers)
        step.release(names[0])
