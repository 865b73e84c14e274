"""What a run will do, and what it will cost: seconds, memory and disk, before anything of it is computed.

Disk is counted exactly, from the shapes of all tensors. Time and memory are measured: the run's own engine takes a few
examples through the first block of each stack, whole batches next, and what that costs is scaled to all examples and
all blocks.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from epmq.calibration.collect import LayerGroup
from epmq.calibration.engine import Block, CalibrationEngine, block_names, round_blocks
from epmq.calibration.outside import OutsideStep
from epmq.calibration.sequential import BlockStep
from epmq.calibration.tiles import TiledLayer
from epmq.data.encoding import split_first
from epmq.export import FORMATS
from epmq.merging.experts import ExpertSet
from epmq.merging.merged import MergedWeights
from epmq.models.blocks import find_stacks
from epmq.models.checkpoint import bits_per_weight, byte_size
from epmq.pipeline.budget import check_budget, limit_bytes
from epmq.pipeline.cost_refining import refining_cost
from epmq.pipeline.exporting import check_targets
from epmq.pipeline.layout import stored_parts
from epmq.pipeline.opening import note_unopened
from epmq.pipeline.output import form_of, parameters_of, weight_specs
from epmq.pipeline.prepare import Objects, PreparedRun, prepare
from epmq.pipeline.refining import check_refine, refines
from epmq.pipeline.run import TRIED, calibration_batches, calibration_engine
from epmq.quantization.grid import BITS
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe
from epmq.reporting.report import size_text
from epmq.runtime import (
    gc_frozen,
    memory_mb,
    peak_memory_mb,
    progress_bars,
    reset_peak_memory,
    return_freed_memory,
    select_device,
)

# Examples of each task in the larger measurement, at least.
WIDE = 8
# Seconds that its examples should take in the blocks that are measured: less is not told from noise.
MEASURED_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it is predicted to cost.

    Attributes:
        recipe: with everything filled in that depends on the checkpoints.
        blocks, layers: of the model; layers are those that are quantized, tables among them.
        tokens: of calibration, all tasks together, padding left out; 0 where nothing is calibrated.
        seconds: by phase, of a machine that does nothing else; evaluation is not among them.
        resident_mb: memory of the process when all is open, in MB of 10⁶ bytes.
        peak_memory_mb: the same at the fullest moment of the run.
        output_bytes: of all weights that will be written.
        parameters: of the output.
        stored: part of the model → how its weights are stored, in words; empty where nothing is quantized.
        disk_bytes: the most that is taken while they are: each byte is written once, straight to its place.
        notes: on what was found in the checkpoints.
    """

    recipe: Recipe
    blocks: int
    layers: int
    tokens: int
    seconds: dict[str, float]
    resident_mb: float
    peak_memory_mb: float
    output_bytes: int
    disk_bytes: int
    notes: list[str]
    parameters: int = 0
    stored: dict[str, str] = field(default_factory=dict)


def dry_run(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    progress: bool = True,
    strict: bool = False,
    calibration: Objects | None = None,
) -> Plan:
    """Open and check everything that a run needs, and predict what it will cost; nothing is written.

    Args:
        recipe: a YAML file, a dict or a `Recipe`.
        progress: show progress bars.
        strict, calibration: as for `epmq.run`.

    Raises:
        MissingError, OutputExistsError, InputError: as `epmq.run` before any compute.
    """
    recipe = load_recipe(recipe)
    start = clock(select_device(recipe.device))
    with progress_bars(progress) as bar:
        prepared = prepare(recipe, bar, calibration=calibration, strict=strict)
        check_budget(prepared)
        check_targets(prepared)
        check_refine(prepared)
        note_unopened(prepared)
    return plan_of(prepared, clock(prepared.device) - start)


def plan_table(plan: Plan) -> Table:
    """What a run will do and cost, for the terminal."""
    recipe, quantize = plan.recipe, plan.recipe.quantize
    table = Table(title="dry run: nothing was written", title_justify="left", show_header=False)
    table.add_row("merge", f"{recipe.merge.method}, {len(recipe.experts)} experts")
    table.add_row("quantize", quantize.method)
    table.add_row("model", f"{plan.blocks} blocks, {plan.layers} layers and tables to quantize")
    for part, stored in plan.stored.items():
        table.add_row(part, stored)
    if recipe.calibrates:
        table.add_row("calibration", f"about {plan.tokens} tokens, or images")
    table.add_section()
    for phase, seconds in plan.seconds.items():
        table.add_row(phase, f"{seconds:.1f} s")
    table.add_row("time", f"{sum(plan.seconds.values()):.1f} s, without evaluation")
    table.add_row("peak memory", f"{plan.peak_memory_mb:.0f} MB")
    size = size_text(plan.output_bytes, bits_per_weight(plan.output_bytes, plan.parameters))
    table.add_row("output", f"{size}; {plan.disk_bytes / 1e6:.1f} MB while it is written")
    for note in plan.notes:
        table.add_row("note", note)
    return table


@gc_frozen()  # as a run is
def plan_of(prepared: PreparedRun, opening: float) -> Plan:
    """The plan of a recipe whose parts are open.

    Args:
        prepared: the parts.
        opening: seconds that opening and checking them takes.
    """
    experts, recipe = prepared.experts, prepared.recipe
    return_freed_memory()
    resident = memory_mb()
    measured = _calibrated(prepared) if recipe.calibrates else _merged(prepared)
    if refines(prepared):
        measured.seconds["refine"], refining_mb = refining_cost(prepared, _first_blocks(prepared))
        measured.memory_mb = max(measured.memory_mb, refining_mb)
    written = sum(map(byte_size, weight_specs(prepared).values()))
    if prepared.layout.free:  # not known before every layer is measured; nearly all of what may be
        written = limit_bytes(prepared) or written
        again = sum(seconds for phase, seconds in measured.seconds.items() if phase in ("merge", "collect"))
        measured.seconds["choose bits"] = again + len(BITS) * measured.seconds.get("solve", 0.0)
    return Plan(
        recipe=recipe,
        blocks=_blocks(experts),
        layers=sum(one.grid is not None or one.solved for one in prepared.layout.of.values()),
        tokens=_tokens(prepared),
        seconds={"open": opening, **measured.seconds},
        resident_mb=resident,
        peak_memory_mb=resident + measured.memory_mb,
        output_bytes=written,
        disk_bytes=written,
        notes=experts.notes,
        parameters=parameters_of(prepared),
        stored=stored_parts(prepared.layout, experts),
    )


@dataclass
class Measured:
    """Seconds by phase, and memory beside what is resident when all is open, in MB of 10⁶ bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: float = 0.0


def _tokens(prepared: PreparedRun) -> int:
    """Calibration tokens, or images where a model takes no tokens."""
    batches = [batch for task in prepared.calibration.values() for batch in task]
    masks = [batch.get("attention_mask", batch.get("input_ids")) for batch in batches]
    return sum(int((mask != 0).sum()) if isinstance(mask, Tensor) else _examples(b) for mask, b in zip(masks, batches))


def _examples(batch: Mapping[str, Any]) -> int:
    return max((len(value) for value in batch.values() if isinstance(value, Tensor)), default=0)


# --- runs without calibration data ---------------------------------------------------------------------------------


def _merged(prepared: PreparedRun) -> Measured:
    """What merging costs, and rounding to nearest where that is asked for: one block of each stack stands for all."""
    first, settings, device = prepared.experts.first_blocks(), prepared.recipe.quantize, prepared.device
    merged = MergedWeights(first, prepared.recipe.merge, prepared.recipe.seed)
    inside = [name for name in first.names if name not in first.outside_names()] or first.names  # all without blocks
    largest = max(first.names, key=lambda name: math.prod(first.base.shape(name)))
    whole = _entries(prepared.experts, prepared.experts.names)
    return_freed_memory()
    reset_peak_memory()
    start = memory_mb()
    seconds = {"merge": _timed(merged.prepare, device, repeats=1) * whole / _entries(first, first.names)}
    next(merged.parts(largest))  # for its memory
    merging = _timed(lambda: [sum(1 for _ in merged.parts(name)) for name in inside], device)
    seconds["merge"] += merging * whole / _entries(first, inside)
    if settings.method == "rtn":
        tensors = SimpleNamespace(tensor={name: merged.tensor(name) for name in inside}.__getitem__)
        seconds["round"] = _timed(lambda: list(round_blocks(first, tensors, prepared.layout)), device)
        seconds["round"] *= _blocks(prepared.experts) / _blocks(first)
    return Measured(seconds, max(peak_memory_mb() - start, 0.0))


def _entries(experts: ExpertSet, names: list[str]) -> int:
    return sum(math.prod(experts.base.shape(name)) for name in names)


def _blocks(experts: ExpertSet) -> int:
    return sum(len(stack.blocks) for stack in find_stacks(experts.model))


def _timed(work: Callable[[], Any], device: torch.device, repeats: int = 2) -> float:
    """Seconds that some work takes, the least of some repeats."""
    spent = []
    for _ in range(repeats):
        start = clock(device)
        work()
        spent.append(clock(device) - start)
    return min(spent)


def clock(device: torch.device) -> float:
    """The wall's clock; with one thread the processor's, which other programs on a busy machine do not move."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- runs with calibration data ------------------------------------------------------------------------------------


@dataclass
class Phase:
    """What one phase took in one block; memory in MB of 10⁶ bytes, at its fullest and when the phase was over."""

    seconds: float = 0.0
    peak_mb: float = 0.0
    held_mb: float = 0.0


class Meter:
    """Notes seconds and peak memory from call to call, by block and phase; see `CalibrationEngine.observe`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.phases: dict[tuple[str, str], Phase] = {}
        self._start()

    def _start(self) -> None:
        reset_peak_memory()
        self._since = clock(self._device)

    def __call__(self, block: str, phase: str) -> None:
        noted = self.phases.setdefault((block, phase), Phase())
        noted.seconds += clock(self._device) - self._since
        noted.peak_mb = max(noted.peak_mb, peak_memory_mb())
        noted.held_mb = max(noted.held_mb, memory_mb())
        self._start()


class _MeasuredEngine(CalibrationEngine):
    """Takes all batches to the end of the block, as it is not the last one of the model."""

    outputs_for = None


class _CollectingEngine(_MeasuredEngine):
    """Leaves the merged weights as they are: what solving takes does not depend on the examples."""

    def _solve(self, step: BlockStep | OutsideStep, group: LayerGroup | TiledLayer, block: Block) -> None:
        pass


@dataclass
class Sample:
    """One measurement.

    Attributes:
        volume: entries of all inputs.
        largest: entries of the largest batch.
        phases: (block, phase) → cost.
        write, read: seconds in which a block that is solved is packed, and unpacked.
    """

    volume: float
    largest: float
    phases: dict[tuple[str, str], Phase]
    write: float = 0.0
    read: float = 0.0


def _first_blocks(prepared: PreparedRun) -> ExpertSet:
    return prepared.experts if prepared.calls.repeated else prepared.experts.first_blocks()


def _calibrated(prepared: PreparedRun) -> Measured:
    """What a run with calibration data costs."""
    sizes = [_volume(batch) for batches in prepared.calibration.values() for batch in batches]
    most = max(_examples(batch) for batches in prepared.calibration.values() for batch in batches)
    first = _first_blocks(prepared)
    merged = MergedWeights(first, prepared.recipe.merge, prepared.recipe.seed)
    return_freed_memory()
    start, share = memory_mb(), _entries(prepared.experts, prepared.experts.names) / _entries(first, first.names)
    measured = Measured({"merge": _timed(merged.prepare, prepared.device, repeats=1) * share})
    measure = partial(_measure, prepared, first, merged)
    few = measure(TRIED, 1, _MeasuredEngine)
    spent = sum(cost.seconds for (_, phase), cost in few.phases.items() if phase in ("collect", "finish"))
    count = min(most, max(2 * TRIED, round(TRIED * MEASURED_SECONDS / spent)))
    many = measure(count, -(-WIDE // count))
    stacks = [] if prepared.calls.repeated else find_stacks(prepared.experts.model)
    lengths = {stack.block_name(0): len(stack.blocks) for stack in stacks}
    for block, phase in few.phases:
        seconds, memory = _extrapolate((block, phase), few, many, sum(sizes), max(sizes))
        name = "solve" if phase == "solve" else "merge" if phase in ("start", "load") else "collect"
        measured.seconds[name] = measured.seconds.get(name, 0.0) + seconds * lengths.get(block, 1)
        measured.memory_mb = max(measured.memory_mb, memory - start)
    repeats = _blocks(prepared.experts) / _blocks(first)
    measured.seconds |= {"write": few.write * repeats, "read back": few.read * repeats}
    return measured


def _extrapolate(key: tuple[str, str], few: Sample, many: Sample, volume: float, largest: float) -> tuple[float, float]:
    """Seconds and peak memory of a phase in the whole run, whose inputs have so many entries, and the largest batch.

    Seconds grow with the examples, and so does what they hold while they wait. What a batch takes while it runs grows
    with the largest batch. Solving takes as much with a few examples as with all.
    """
    less, more = few.phases[key], many.phases[key]
    growth = (volume - many.volume) / (many.volume - few.volume) if many.volume > few.volume else 0.0
    held = max(more.held_mb - less.held_mb, 0.0) * growth
    wider = (more.peak_mb - more.held_mb) * max(largest / many.largest - 1, 0.0)
    if key[1] == "solve":
        return less.seconds, more.peak_mb + held + wider + less.peak_mb - less.held_mb
    return more.seconds + max(more.seconds - less.seconds, 0.0) * growth, more.peak_mb + held + wider


def _volume(batch: Mapping[str, Any]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))


def _measure(
    prepared: PreparedRun,
    first: ExpertSet,
    merged: MergedWeights,
    count: int,
    batches: int,
    engine_class: type[CalibrationEngine] = _CollectingEngine,
) -> Sample:
    """Let an engine go through the first blocks on so many batches of each task, with so many examples at most."""
    calibration = {
        task: [split_first([batch], count)[0] for batch in own[:batches]] for task, own in prepared.calibration.items()
    }
    order = tuple(name for name in prepared.calls.order if name in block_names(first))
    calls = replace(prepared.calls, order=order)
    parts = replace(prepared, experts=first, merged=merged, calibration=calibration, calls=calls)
    inputs = calibration_batches(parts)
    engine = calibration_engine(parts, inputs, engine_class=engine_class)
    return_freed_memory()
    meter = engine.observe = Meter(prepared.device)
    blocks = list(engine)
    meter("", "end")
    sizes = [_volume(batch.inputs) for batch in inputs]
    sample = Sample(sum(sizes), max(sizes), meter.phases)
    for block in blocks:
        _pack(prepared, block, sample)
    return sample


def _pack(prepared: PreparedRun, block: Block, sample: Sample) -> None:
    """Add the seconds in which a block is packed, and unpacked."""
    output_format = FORMATS[prepared.recipe.format]
    for name, weight in block.layers.items():
        start = clock(prepared.device)
        form = form_of(prepared, name)
        tensors = output_format.tensors(name, weight, form)
        packed = clock(prepared.device)
        output_format.weight(name, tensors.__getitem__, form).float()
        sample.write += packed - start
        sample.read += clock(prepared.device) - packed
