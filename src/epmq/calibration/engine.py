"""The loop: block by block through the merged model, collect moments, solve, yield the finished block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from epmq.calibration.collect import LayerGroup, collect, find_layer_targets
from epmq.calibration.context import CalibrationContext
from epmq.calibration.head_refit import HeadFit, HeadRefitter
from epmq.calibration.sequential import Batch, BlockStep, SequentialCalibrator
from epmq.calibration.teacher import MakeHead, Teacher, equals_merge
from epmq.errors import error_context
from epmq.merging.experts import ExpertSet, TensorReader
from epmq.method_settings import Quantize
from epmq.models.blocks import as_matrix, find_stacks, linears
from epmq.models.hooks import first_tensor
from epmq.models.meta import load_outside, materialize, set_tensor, to_meta
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import QuantizedTensor
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.rtn import rtn, rtn_fallback
from epmq.runtime import return_freed_memory


@dataclass
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: in the model.
        shape: [out, in].
        group: name of the first layer that shares its input.
        loss: tr((Q − W*) H (Q − W*)ᵀ); None for round-to-nearest, which sees no data.
        merge_loss: tr((W_m − W*) H (W_m − W*)ᵀ), what the merged weight is off the target; None as above.
        strength: λ̄ over the mean Gram diagonal that was used; None where no expert has a say.
        damping: the same for the H in which codes are chosen.
        tokens: calibration tokens seen.
        seconds: of the solve, shared evenly in a group.
        aims: whether it aims at a sum in the residual stream.
        rounded: rows that are rounded to nearest after all, see `rtn_fallback`.
        largest: the largest input, where the weights are stored in float16; else 0.
    """

    name: str
    shape: list[int]
    group: str
    loss: float | None = None
    merge_loss: float | None = None
    strength: float | None = None
    damping: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    aims: bool = False
    rounded: int = 0
    largest: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Block:
    """A finished block.

    Attributes:
        name: in the model.
        reports: what happened to its layers.
        layers: name in the model → its quantized weight.
        tensors: name in the model → every other tensor, in the dtype it is written in.
    """

    name: str
    reports: list[LayerReport]
    layers: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class FinishedBlock(Protocol):
    """A block that an earlier run has finished: its reports, and its tensors as the model stores them."""

    name: str
    reports: list[LayerReport]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the block, by its name in the model; a quantized weight is dequantized."""


def round_blocks(
    experts: ExpertSet, merged: TensorReader, settings: Quantize, finished: Sequence[FinishedBlock] = ()
) -> Iterator[Block]:
    """Round the merged model to nearest, a block at a time, without calibration data.

    Args:
        experts: base and experts.
        merged: the merge of them.
        settings: of the quantizer.
        finished: the first blocks, where an earlier run has finished them; only their reports are yielded again.
    """
    stacks = find_stacks(experts.model)
    blocks = [(stack.block_name(index), block) for stack in stacks for index, block in enumerate(stack.blocks)]
    for number, (name, module) in enumerate(blocks):
        if number < len(finished):
            yield Block(name, finished[number].reports)
            continue
        block, layers = Block(name, []), dict(linears(module))
        for tensor_name in experts.block_names(name):
            local = tensor_name[len(name) + 1 :].removesuffix(".weight")
            if local not in layers or not tensor_name.endswith(".weight"):
                block.tensors[tensor_name] = merged.tensor(tensor_name)
                continue
            weight = as_matrix(layers[local], merged.tensor(tensor_name))
            start = time.perf_counter()
            search = settings.scales == "search"
            block.layers[f"{name}.{local}"] = rtn(weight, settings.grid, search=search, scale_dtype=weight.dtype)
            seconds = time.perf_counter() - start
            block.reports.append(LayerReport(f"{name}.{local}", list(weight.shape), local, seconds=seconds))
        yield block


class CalibrationEngine:
    """Quantizes with calibration data: iterate to get one finished `Block` after the other.

    Every block sees the inputs that the quantized blocks before it produce.

    Args:
        context: readers, settings, device.
        batches: of every task, task by task.
        make_heads: task → what puts the expert's head on a backbone.
        finished: the first blocks, where an earlier run has finished them; only their reports are yielded again.
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
        finished: Sequence[FinishedBlock] = (),
        keep: bool = False,
    ) -> None:
        self.context, self.batches, self.finished, self.keep = context, batches, finished, keep
        self.make_heads = make_heads or {}
        self.output: Tensor | None = None
        self.head_fits: dict[str, HeadFit] = {}
        self.observe: Callable[[str, str], None] = lambda block, phase: None

    def __iter__(self) -> Iterator[Block]:
        context, experts = self.context, self.context.experts
        load_outside(experts.model, experts.outside_names(), context.merged.tensor, context.device, experts.tied)
        with ExitStack() as stack:  # what waits in an expert's forward would never be freed
            for teacher in self._start_teachers():
                stack.callback(teacher.close)
            refitter = self._refitter()
            on_finished = refitter.on_finished if refitter else None
            calibrator = SequentialCalibrator(
                experts.model, self.batches, on_finished, context.offloader, self.outputs_for
            )
            aimed = False
            self.observe("", "start")
            for number, step in enumerate(calibrator):
                block = self._finish_again(step, number) if number < len(self.finished) else self._quantize(step)
                aimed |= any(report.aims for report in block.reports)
                step.finish()
                if not self.keep:
                    to_meta(step.block)
                self.observe(step.name, "finish")
                yield block
            self.output = first_tensor(calibrator.stacks[-1].outputs[0])
            if refitter:
                self.head_fits = refitter.fits()
        if context.teachers and context.guidance.stream and not aimed:
            experts.notes.append("no layer adds to the residual stream directly: expert_stream changed no target")

    def _start_teachers(self) -> Iterator[Teacher]:
        """A teacher for every expert, if the settings ask what the experts themselves compute."""
        context = self.context
        for task, expert in context.experts.experts.items() if context.guidance.runs_experts else ():
            if not equals_merge(context.experts, expert, context.merged):
                batches = [batch for batch in self.batches if batch.task == task]
                make_head = self.make_heads.get(task, lambda backbone: None)
                teacher = Teacher(context.experts, expert, batches, make_head, context.device, context.offloader)
                context.teachers[task] = teacher
                yield teacher

    def _refitter(self) -> HeadRefitter | None:
        if not self.context.guidance.refit_heads:
            return None
        return HeadRefitter(self.context.experts, self.make_heads, self.context.teachers)

    def _finish_again(self, step: BlockStep, number: int) -> Block:
        """Put a block that an earlier run has finished into the live model, and take the experts past it."""
        finished, context = self.finished[number], self.context
        if finished.name != step.name:
            raise RuntimeError(f"the finished block is {finished.name}, not {step.name}: begin anew with --restart")
        materialize(context.experts.model, context.experts.block_names(step.name), finished.tensor, context.device)
        for teacher in context.teachers.values():
            teacher.run(step.name, ())
            teacher.end_block()
        return Block(step.name, finished.reports)

    def _quantize(self, step: BlockStep) -> Block:
        """Collect and solve the layers of a block, and put them into it, in the order of the forward.

        Each sees the inputs that the quantized layers before it give, and so mends what they left: a weight that is
        fitted to inputs that then change does harm.
        """
        context, experts, block = self.context, self.context.experts, Block(step.name, [])
        materialize(experts.model, experts.block_names(step.name), context.merged.tensor, context.device)
        with error_context(step.name):
            targets = find_layer_targets(step, bool(context.teachers) and context.guidance.stream)
        adds = [add for _, add in targets if add is not None]
        pauses = [group.names[0] for group, _ in targets if group.calls == 1]
        step.pause_before(pauses, {add.skip_input for add in adds})
        points = [add.point if add else group.names[0] for group, add in targets if add or context.guidance.features]
        self.observe(step.name, "load")
        for target in targets:
            group = LayerGroup(context, step, target)
            collect(step, group, context, points)
            return_freed_memory()  # activations that stay lie between what is freed
            self.observe(step.name, "collect")
            with error_context(f"{step.name}.{group.names[0]}"):
                self._solve(step, group, block)
            self.observe(step.name, "solve")
            step.release(group.names[0])
            del group
        for teacher in context.teachers.values():
            teacher.end_block()
        return_freed_memory()
        for name, tensor in step.block.state_dict(prefix=f"{step.name}.").items():
            if name in experts.names and name.removesuffix(".weight") not in block.layers:
                block.tensors[name] = tensor.to(experts.base.dtype(name) or tensor.dtype)
        return block

    def _solve(self, step: BlockStep, group: LayerGroup, block: Block) -> None:
        """Quantize the layers of one input group together, and put the result into the live block."""
        settings, guidance, objective = self.context.settings, self.context.guidance, group.objective
        start = time.perf_counter()
        target, ridge = group.merged, None
        if guidance.ridge is not None:
            target, ridge = objective.target(guidance.ridge, settings.act_order)
        factor, damping = objective.factor(guidance.damping or ridge or 0.0, settings.act_order)
        search = settings.scales == "search"
        solved, loss = gptq(target, factor, settings.grid, search=search, scale_dtype=group.dtype)
        hessian = objective.damped(damping)
        solved, loss, rounded = rtn_fallback(solved, loss, target, hessian)
        if group.merged is objective.anchor:
            merge_loss = objective.anchor_loss(target, ridge or 0.0, damping)
        else:
            merge_loss = hessian_loss(group.merged - target, hessian)
        seconds = (time.perf_counter() - start) / len(group.names)
        common = LayerReport("", [], group.names[0], strength=ridge, damping=damping, tokens=group.tokens)
        common = replace(common, seconds=seconds, aims=group.residual_add is not None, largest=group.largest)
        by_layer = (torch.split(part, group.rows) for part in (loss, merge_loss, rounded))
        for local, module, quantized, losses, merge_losses, rows in zip(
            group.names, group.modules, solved.split(group.rows), *by_layer
        ):
            name, shape = f"{step.name}.{local}", list(quantized.codes.shape)
            set_tensor(step.block, f"{local}.weight", as_matrix(module, quantized.dequantize().float()))
            block.layers[name] = quantized
            report = replace(common, name=name, shape=shape, loss=float(losses.sum()), rounded=int(rows.sum()))
            block.reports.append(replace(report, merge_loss=float(merge_losses.sum())))
