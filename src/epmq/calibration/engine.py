"""The loop: block by block through the merged model, collect moments, solve, yield the finished block."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from epmq.calibration.collect import LayerGroup, Problem, collect
from epmq.calibration.context import CalibrationContext
from epmq.calibration.grouping import LayerTarget, find_targets
from epmq.calibration.head_refit import HeadFit, HeadRefitter
from epmq.calibration.mixture import RoutedTokens, pass_block
from epmq.calibration.outside import OutsideStep
from epmq.calibration.repeated import calibrator_of
from epmq.calibration.sequential import Batch, BlockStep
from epmq.calibration.teacher import MakeHead, Teacher, equals_merge
from epmq.calibration.tiles import TiledLayer, layer_group
from epmq.errors import error_context
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import TensorReader
from epmq.models.blocks import as_matrix, find_stacks, linears
from epmq.models.hooks import HookPoint, first_tensor
from epmq.models.meta import load_outside, materialize, set_tensor, to_meta
from epmq.models.storage import Layout, join
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.stacked import Solved, join_solved, solve
from epmq.runtime import return_freed_memory
from epmq.storage_settings import PLAIN


@dataclass
class LayerReport:
    """What happened to one linear layer. Losses are None for round-to-nearest, which sees no data."""

    name: str  # in the model
    shape: list[int]  # [out, in]
    group: str  # name of the first layer that shares its input
    bits: int = PLAIN  # 16 where it is not rounded
    group_size: int = -1
    symmetric: bool = True
    loss: float | None = None  # tr((Q − W*) H (Q − W*)ᵀ)
    merge_loss: float | None = None  # tr((W_m − W*) H (W_m − W*)ᵀ), what the merged weight is off the target
    strength: float | None = None  # λ̄ over the mean Gram diagonal that was used; None where no expert has a say
    damping: float | None = None  # the same for the H in which codes are chosen
    tokens: int = 0  # calibration tokens seen
    seconds: float = 0.0  # of the solve, shared evenly in a group
    aims: bool = False  # whether it aims at a sum in the residual stream
    rounded: int = 0  # rows that are rounded to nearest after all, see `rtn_fallback`
    largest: float = 0.0  # the largest input, where the weights are stored in float16; else 0
    pooled: int = 0  # tokens that go to other experts of its mixture and that it was solved on beside its own


@dataclass
class Block:
    """A finished block, or the layers after the last one, whose name is "".

    Where an earlier run has finished it, its weights are in the output and not here.
    """

    name: str
    reports: list[LayerReport]
    layers: dict[str, QuantizedTensor] = field(default_factory=dict)  # name in the model → its quantized weight
    tensors: dict[str, Tensor] = field(default_factory=dict)  # every other tensor, in the dtype it is written in


def round_blocks(
    experts: ExpertSet, merged: TensorReader, layout: Layout, finished: Sequence[Block] = ()
) -> Iterator[Block]:
    """Round the merged model to nearest, a block at a time, without calibration data; after those that are finished."""
    yield from finished
    for name in block_names(experts)[len(finished) :]:
        yield round_block(experts, merged, layout, name)


def block_names(experts: ExpertSet) -> list[str]:
    """Names of all blocks, stack by stack."""
    stacks = find_stacks(experts.model)
    return [stack.block_name(index) for stack in stacks for index in range(len(stack.blocks))]


def round_block(experts: ExpertSet, merged: TensorReader, layout: Layout, name: str) -> Block:
    """Round the merged block of that name to nearest."""
    block, layers = Block(name, []), dict(linears(experts.model.get_submodule(name)))
    for tensor_name in experts.block_names(name):
        tensor, local = merged.tensor(tensor_name), tensor_name[len(name) + 1 :].removesuffix(".weight")
        if local in layers and layout.of[tensor_name].grid is not None:
            round_layer(block, local, as_matrix(layers[local], tensor), layout)
        else:
            block.tensors[tensor_name] = layout.cast(tensor_name, tensor)
    return block


def round_layer(block: Block, local: str, weight: Tensor, layout: Layout) -> QuantizedTensor:
    """Round the weight [out, in] of a layer to nearest, and put it into its block, by its name there."""
    start, name = time.perf_counter(), join(block.name, local)
    rounded = block.layers[name] = layout.round(f"{name}.weight", [weight])
    seconds = time.perf_counter() - start
    block.reports.append(report_of(name, weight, rounded.grid, group=local, seconds=seconds))
    return rounded


def report_of(name: str, weight: Tensor, grid: Grid | None, **fields: Any) -> LayerReport:
    """The report of a layer by its name, its weight [out, in] and its grid."""
    grid_fields = {} if grid is None else asdict(grid)
    return LayerReport(name, list(weight.shape), **{**grid_fields, **fields})


class CalibrationEngine:
    """Quantizes with calibration data: iterate to get one finished `Block` after the other.

    Every block sees the inputs that the quantized blocks before it produce.

    Args:
        context: readers, settings, device.
        batches: of every task, task by task.
        make_heads: task → what puts the expert's head on a backbone.
        finished: the first blocks, where an earlier run has finished them; they are yielded as they are.
        written: reads the tensors of these.
        keep: leave the quantized weights in the live model; otherwise a block is freed when it is done.

    Attributes:
        output: what the last block gave on the first batch, [..., hidden]; None until the end.
        head_fits: task → its head as it was, and the fit of its last linear map; complete at the end.
        observe: called with a block's name and a phase (start, load, collect, solve, finish) when the phase ends.

    Raises:
        InputError: a layer saw no data or not finite data, or its Hessian cannot be factored; it is named.
    """

    outputs_for: int | None = 1  # batches that go through the last block to its end: of the others nobody asks that

    def __init__(
        self,
        context: CalibrationContext,
        batches: Sequence[Batch],
        make_heads: Mapping[str, MakeHead] | None = None,
        finished: Sequence[Block] = (),
        written: TensorReader | None = None,
        keep: bool = False,
    ) -> None:
        self.context, self.batches, self.keep = context, batches, keep
        self.finished, self.written, self.make_heads = finished, written, make_heads or {}
        self.output: Tensor | None = None
        self.head_fits: dict[str, HeadFit] = {}
        self._noted = False  # whether layers that see some tokens only are in the notes
        self._aimed = False  # whether a layer aims at the experts' stream
        self.observe: Callable[[str, str], None] = lambda block, phase: None

    def __iter__(self) -> Iterator[Block]:
        context, experts = self.context, self.context.experts
        load_outside(experts.model, experts.outside_names(), self._outside, context.device, experts.tied)
        with ExitStack() as stack:  # what waits in an expert's forward would never be freed
            for teacher in self._start_teachers():
                stack.callback(teacher.close)
            refits = context.guidance.refit_heads
            refitter = HeadRefitter(experts, self.make_heads, context.teachers) if refits else None
            on_finished = refitter.on_finished if refitter else None
            for name in context.calls.order if context.calls.repeated else ():  # they are in memory to the end
                materialize(experts.model, experts.block_names(name), context.tensor, context.device)
            calibrator = calibrator_of(
                experts.model,
                self.batches,
                context.calls,
                on_finished,
                context.offloader,
                self.outputs_for,
                context.layout.late,
            )
            number = 0
            self.observe("", "start")
            for number, step in enumerate(calibrator, start=1):
                if number <= len(self.finished):
                    block = self._finish_again(step, number - 1)
                else:
                    block = self._quantize(step)
                self._aimed |= any(report.aims for report in block.reports)
                step.finish()
                self._check_missed(step)
                if not self.keep and step.lockstep:
                    to_meta(step.block)
                self.observe(step.name, "finish")
                yield block
            self.output = first_tensor(calibrator.first_output)
            if refitter:
                self.head_fits = refitter.fits()
            if not self.keep and context.calls.repeated:
                for name in context.calls.order:
                    to_meta(experts.model.get_submodule(name))
        yield from self._round_rest(number)
        if context.teachers and context.guidance.stream and not self._aimed:
            experts.notes.append("no layer adds to the residual stream directly: expert_stream changed no target")

    def _outside(self, name: str) -> Tensor:
        """A tensor outside the blocks as the output has it; a layer that is still to be solved as it is merged.

        What is quantized was held against its codes when it was written, and is read back; everything else comes from
        the merge, so that the output can be held against it.
        """
        context = self.context
        storage = context.layout.of.get(name)
        quantized = storage is not None and storage.grid is not None
        if self.written is not None and quantized and name.removesuffix(".weight") not in context.layout.late:
            return self.written.tensor(name)
        return context.layout.as_stored(name, context.merged.tensor(name))

    def _round_rest(self, number: int) -> Iterator[Block]:
        """Round the blocks to nearest that no batch calls; `number` blocks are done."""
        context, experts = self.context, self.context.experts
        for name in block_names(experts):
            if name in (context.calls.order or [name]):
                continue
            if any(context.layout.solves(f"{name}.{local}") for local, _ in linears(experts.model.get_submodule(name))):
                experts.notes.depart(f"no calibration data reaches {name}: it is rounded to nearest")
            if number < len(self.finished):
                yield self.finished[number]
            else:
                yield round_block(experts, context.merged, context.layout, name)
            number += 1

    def _check_missed(self, step: BlockStep | OutsideStep) -> None:
        for layer, rows in step.missed.items():
            note = f"{step.name}.{layer}: {rows} tokens reach it in a way that the first examples do not show"
            self.context.experts.notes.depart(f"{note}; it is calibrated on the others alone")

    def _start_teachers(self) -> Iterator[Teacher]:
        """A teacher for every expert, if the settings ask what the experts themselves compute."""
        context = self.context
        for task, expert in context.experts.experts.items() if context.guidance.runs_experts else ():
            if not equals_merge(context.experts, expert, context.merged):
                batches = [batch for batch in self.batches if batch.task == task]
                make_head = self.make_heads.get(task, lambda backbone: None)
                teacher = Teacher(
                    context.experts,
                    expert,
                    batches,
                    make_head,
                    context.device,
                    context.offloader,
                    context.calls,
                    context.layout.late,
                )
                context.teachers[task] = teacher
                yield teacher

    def _finish_again(self, step: BlockStep | OutsideStep, number: int) -> Block:
        """Put a block that an earlier run has finished into the live model, and take the experts past it."""
        block, context, experts = self.finished[number], self.context, self.context.experts
        if block.name != step.name or self.written is None:
            raise RuntimeError(f"the finished block is {block.name}, not {step.name}: begin anew with --restart")
        materialize(experts.model, self._names(step), self.written.tensor, context.device)
        pass_block(step, context.teachers)
        return block

    def _names(self, step: BlockStep | OutsideStep) -> list[str]:
        """Names of the tensors that a step decides on."""
        if isinstance(step, OutsideStep):
            return [f"{layer}.weight" for layer in step.layers]
        return self.context.experts.block_names(step.name)

    def _quantize(self, step: BlockStep | OutsideStep) -> Block:
        """Collect and solve the layers of a block, and put them into it, in the order of the forward.

        Each sees the inputs that the quantized layers before it give, and so mends what they left: a weight that is
        fitted to inputs that then change does harm.
        """
        context, block = self.context, Block(step.name, [])
        if step.lockstep:  # else it is there already
            materialize(context.experts.model, self._names(step), context.tensor, context.device)
        with error_context(step.name or "the layers after the last block"):
            stream = bool(context.teachers) and context.guidance.stream
            targets, idle = find_targets(step, stream, context.layout.solves)
        self._aimed |= any(target.add is not None for target in targets)
        if isinstance(step, BlockStep):
            step.pause_before(
                [target.place for target in targets if target.waits],
                {target.add.skip_input for target in targets if target.add is not None},
            )
        points = [point for target in targets for point in self._points(step, target)]
        if not targets:
            pass_block(step, context.teachers)
        self.observe(step.name, "load")
        for target in targets:
            if isinstance(step, BlockStep) and target.mixture is not None:
                idle += self._quantize_mixture(step, target, points, block)
                continue
            group = layer_group(context, step, target)
            collect(step, group, context, points)
            return_freed_memory()  # activations that stay lie between what is freed
            self.observe(step.name, "collect")
            idle += self._solve_seen(step, group, block)
            step.release(group.names[0])
            del group
        self._round(step, idle, block)
        routed = [target for target in targets if target.routed and target.mixture is None]
        self._note_routed([target.names[0] for target in routed], step.name)
        for teacher in context.teachers.values():
            teacher.end_block()
        return_freed_memory()
        self._take_rest(step, block)
        return block

    def _quantize_mixture(
        self, step: BlockStep, target: LayerTarget, points: Sequence[HookPoint], block: Block
    ) -> list[str]:
        """Solve the layers of a mixture's experts, one expert after the other; returns those that no batch comes by."""
        idle, mixture = list[str](), RoutedTokens(step, target.place, self.context, points)
        for group in mixture.groups(target.names):
            self.observe(step.name, "collect")
            idle += self._solve_seen(step, group, block)
        mixture.go_on()
        return idle

    def _solve_seen(self, step: BlockStep | OutsideStep, group: LayerGroup | TiledLayer, block: Block) -> list[str]:
        """Solve layers that some token has reached; returns the names of the others."""
        if group.tokens:
            with error_context(group.layers[0]):
                self._solve(step, group, block)
        self.observe(step.name, "solve")
        return [] if group.tokens else group.names

    def _points(self, step: BlockStep | OutsideStep, target: LayerTarget) -> list[HookPoint]:
        """Where the experts' own values are asked for, for layers that share an input."""
        return target.points(self.context.features([join(step.name, name) for name in target.names]) > 0)

    def _take_rest(self, step: BlockStep | OutsideStep, block: Block) -> None:
        """Put what is not quantized of a block into its result, in the dtype in which it is stored."""
        layout, state = self.context.layout, step.block.state_dict(prefix=step.name and f"{step.name}.")
        for name in self._names(step):
            if name.removesuffix(".weight") not in block.layers:
                block.tensors[name] = state[name].to(layout.of[name].dtype or state[name].dtype)

    def _round(self, step: BlockStep | OutsideStep, names: Sequence[str], block: Block) -> None:
        """Round the layers of a block to nearest that see no data."""
        context = self.context
        names = [name for name in names if context.layout.grid(join(step.name, name)) is not None]
        if not names:
            return
        listed, where = ", ".join(names), f"{step.name}: " if step.name else ""
        context.experts.notes.depart(f"{where}no calibration data reaches {listed}: rounded to nearest")
        for local in names:
            module, merged = step.block.get_submodule(local), context.merged.tensor(f"{join(step.name, local)}.weight")
            rounded = round_layer(block, local, as_matrix(module, merged).to(context.device), context.layout)
            set_tensor(step.block, f"{local}.weight", as_matrix(module, rounded.dequantize().float()))

    def _note_routed(self, names: Sequence[str], block: str) -> None:
        """Say, once, that values decide which tokens some layers see."""
        if names and self.context.teachers and self.context.guidance.features and not self._noted:
            self._noted = True
            self.context.experts.notes.append(
                f"values decide which tokens reach {block}.{names[0]} and others like it, and an expert decides "
                "otherwise: expert_features has no say there"
            )

    def _solve(self, step: BlockStep | OutsideStep, group: LayerGroup | TiledLayer, block: Block) -> None:
        """Quantize the layers of one input group together, and put the result into the live block."""
        start = time.perf_counter()
        problem, solved, merge_losses = self._solve_tiles(group)
        seconds = (time.perf_counter() - start) / len(group.names)
        strength, damping = problem.ridge, problem.damping
        common = LayerReport("", [], group.names[0], strength=strength, damping=damping)
        common = replace(common, tokens=group.tokens - group.pooled, pooled=group.pooled)
        common = replace(common, seconds=seconds, aims=group.target.add is not None, largest=group.largest)
        for layer, local, module, one, loss in zip(group.layers, group.names, group.modules, solved, merge_losses):
            if layer != self.context.layout.output_layer or one.codes is None:  # which nothing reads any more
                set_tensor(step.block, f"{local}.weight", as_matrix(module, one.weight.float()))
            grid = {}
            if one.codes is not None:
                block.layers[layer], grid = one.codes, asdict(one.codes.grid)
            report = replace(common, name=layer, shape=list(one.weight.shape), loss=one.loss, rounded=one.rounded)
            block.reports.append(replace(report, merge_loss=loss, **grid))

    def _solve_tiles(self, group: LayerGroup | TiledLayer) -> tuple[Problem, list[Solved], list[float]]:
        """What is solved, what becomes of each layer, and by how much its merged weight is off the target."""
        pieces, losses = list[list[Solved]](), list[list[float]]()
        for tile in group.tiles():
            problem, objective = tile.problem(), tile.objective
            target, hessian = problem.target, problem.hessian
            pieces.append(solve(target, problem.factor, hessian, tile.parts, self.context.layout.search))
            if tile.merged is objective.anchor:
                merge_loss = objective.anchor_loss(target, problem.ridge or 0.0, problem.damping)
            else:
                merge_loss = hessian_loss(tile.merged - target, hessian)
            losses.append([float(own.sum()) for own in torch.split(merge_loss, tile.rows)])
        return problem, [join_solved(of_layer) for of_layer in zip(*pieces)], [sum(own) for own in zip(*losses)]
