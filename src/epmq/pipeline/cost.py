"""What a run will do, and what it will cost: seconds, memory and disk, before anything of it is computed.

Disk is counted exactly, from the shapes of all tensors. Time is that of the parts of the job at small sizes, measured
on the spot (`epmq.pipeline.measure`) and scaled up by their numbers of operations; memory is counted from what the
loop holds at its fullest moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from epmq.calibration.sequential import Batch
from epmq.data.encoding import encode, split_first, to_device
from epmq.export import FORMATS
from epmq.merging.experts import Sources
from epmq.models.blocks import as_matrix, block_linears, find_stacks
from epmq.models.writer import PART_BYTES, SHARD_BYTES
from epmq.pipeline.measure import (
    GroupTrial,
    Rates,
    StackTrial,
    clock,
    codes_seconds,
    factor_seconds,
    measure_rates,
    moments_seconds,
    rounding_seconds,
    target_seconds,
    timed,
    try_stacks,
)
from epmq.pipeline.prepare import Objects, PreparedRun, prepare
from epmq.pipeline.run import TRIED
from epmq.recipe import Quantize, Recipe
from epmq.recipe_file import load_recipe
from epmq.runtime import gc_frozen, memory_mb, progress_bars, return_freed_memory, select_device

FLOAT = 4  # bytes
# Seconds that a block may take for the examples on which it is timed.
TRIAL_SECONDS = 0.15


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it is predicted to cost.

    Attributes:
        recipe: with everything filled in that depends on the checkpoints.
        blocks, layers: of the model; layers are those that are quantized.
        tokens: of calibration, all tasks together, padding left out; 0 where nothing is calibrated.
        seconds: by phase, of a machine that does nothing else; evaluation is not among them.
        resident_mb: memory of the process when all is open, in MB of 10⁶ bytes.
        peak_memory_mb: the same at the fullest moment of the run.
        output_bytes: of all weights that will be written.
        disk_bytes: the most that is taken while they are: finished blocks are there until the end, with a byte a
            weight, and parts until they are joined, a shard at a time.
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


def dry_run(
    recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True, calibration: Objects | None = None
) -> Plan:
    """Open and check everything that a run needs, and predict what it will cost; nothing is written.

    Args:
        recipe: a YAML file, a dict or a `Recipe`.
        progress: show progress progress_bars.
        calibration: as for `epmq.run`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: as `epmq.run` before any compute.
    """
    recipe = load_recipe(recipe)
    place = select_device(recipe.device)
    start = clock(place)
    with progress_bars(progress) as bar:
        job = prepare(recipe, bar, calibration=calibration)
    return plan_of(job, clock(place) - start)


def plan_table(plan: Plan) -> Table:
    """What a run will do and cost."""
    recipe, quantize = plan.recipe, plan.recipe.quantize
    table = Table(title="dry run: nothing was written", title_justify="left", show_header=False)
    table.add_row("merge", f"{recipe.merge.method}, {len(recipe.experts)} experts")
    table.add_row("quantize", quantize.method)
    table.add_row("model", f"{plan.blocks} blocks, {plan.layers} layers to quantize")
    if quantize.method != "none":
        table.add_row("bits", f"{quantize.bits}, group size {quantize.group_size}")
    if quantize.calibrates:
        table.add_row("calibration", f"about {plan.tokens} tokens")
    table.add_section()
    for phase, seconds in plan.seconds.items():
        table.add_row(phase, f"{seconds:.1f} s")
    table.add_row("time", f"{sum(plan.seconds.values()):.1f} s, without evaluation")
    table.add_row("peak memory", f"{plan.peak_memory_mb:.0f} MB")
    table.add_row("output", f"{plan.output_bytes / 1e6:.1f} MB; {plan.disk_bytes / 1e6:.1f} MB while it is written")
    for note in plan.notes:
        table.add_row("note", note)
    return table


@gc_frozen()  # as a run is
def plan_of(job: PreparedRun, opening: float) -> Plan:
    """The plan of a recipe whose parts are open.

    Args:
        job: the parts.
        opening: seconds that opening and checking them takes.
    """
    place, sources = select_device(job.recipe.device), job.sources
    layers = list(block_linears(sources.model)) if job.recipe.quantize.method != "none" else []
    tried = _try(job) if job.recipe.quantize.calibrates else None
    rates = measure_rates(sources, place)
    seconds = _merging(sources, rates, place) if tried is None else _guiding(sources, tried, rates, place)
    written = output_bytes(sources)
    return_freed_memory()
    resident = memory_mb()
    return Plan(
        recipe=job.recipe,
        blocks=sum(len(stack.blocks) for stack in find_stacks(sources.model)),
        layers=len(layers),
        tokens=0 if tried is None else round(tried.stacks[0].groups[0].tokens * tried.times * tried.real),
        seconds={"open": opening, **seconds},
        resident_mb=resident,
        peak_memory_mb=resident + _held(sources, tried, written) / 1e6,
        output_bytes=written,
        disk_bytes=written + (min(written, SHARD_BYTES) if written > PART_BYTES else 0) + _journal_bytes(sources),
        notes=sources.notes,
    )


@dataclass(frozen=True)
class Tried:
    """A few calibration examples in one block of each stack, and how many times as much all of them are.

    Attributes:
        stacks: what the blocks took.
        times: entries of all calibration batches over those of the examples that were tried.
        widest: entries of the largest batch over the same.
        few: entries of the examples on which the layers of each block are sorted, over the same.
        real: share of the tokens that are not padding.
        inputs: bytes of the batches that are not in memory yet.
    """

    stacks: list[StackTrial]
    times: float
    widest: float
    few: float
    real: float
    inputs: float


def _try(job: PreparedRun) -> Tried:
    place, settings = select_device(job.recipe.device), job.recipe.quantize
    weighed = [(to_device(batch, place), times) for batch, times in _batches(job)]
    first, apart = weighed[0][0], bool(settings.expert_stream)
    probe = split_first([first], TRIED)[0]
    few, stacks = _volume(probe), try_stacks(job.sources, probe, apart, place)
    slowest = max(stack.seconds for stack in stacks)
    if 2 * slowest < TRIAL_SECONDS:
        probe = split_first([first], int(TRIED * TRIAL_SECONDS / slowest))[0]
        stacks = try_stacks(job.sources, probe, apart, place)
    volume, masks = (
        _volume(probe),
        [(batch["attention_mask"], times) for batch, times in weighed if "attention_mask" in batch],
    )
    real = sum(times * int(mask.sum()) for mask, times in masks) / (
        sum(times * mask.numel() for mask, times in masks) or 1
    )
    ready = all(examples.kind == "batches" for examples in job.calibration.values())
    return Tried(
        stacks,
        times=sum(times * _volume(batch) for batch, times in weighed) / volume,
        widest=max(_volume(batch) for batch, _ in weighed) / volume,
        few=few / volume,
        real=real if masks else 1.0,
        inputs=0 if ready else sum(times * _bytes(batch) for batch, times in weighed),
    )


def _batches(job: PreparedRun) -> Iterator[tuple[Batch, float]]:
    """Batches of each task and how often each counts; of what is not encoded yet the first one stands for all."""
    for examples in job.calibration.values():
        batches = encode(examples, job.processor, job.recipe.batch_size, job.recipe.max_length)
        if examples.kind == "batches":
            yield from ((batch, 1.0) for batch in batches)
        else:
            yield next(batches), len(examples) / min(len(examples), job.recipe.batch_size)


def _volume(batch: Batch) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))


def _bytes(batch: Batch) -> int:
    return sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))


def _merging(sources: Sources, rates: Rates, place: torch.device) -> dict[str, float]:
    """Seconds of what needs no calibration."""
    seconds = {"merge": rates.merge * _entries(sources, sources.names)}
    settings = sources.recipe.quantize
    if settings.method == "rtn":
        layers = [f"{name}.weight" for name, _ in block_linears(sources.model)]
        seconds["round"] = rounding_seconds(settings, place) * _entries(sources, layers)
    return seconds


def _guiding(sources: Sources, tried: Tried, rates: Rates, place: torch.device) -> dict[str, float]:
    """Seconds of what `quantize_calibrated` does, by phase."""
    settings, experts = sources.recipe.quantize, len(sources.experts)
    streams = streaming(settings)
    seconds = {"merge": rates.merge * _entries(sources, sources.names)}
    building = timed(sources.skeleton, place)
    seconds["merge"] += experts * streams * building
    seconds |= dict.fromkeys(("forward", "moments", "targets", "solve"), 0.0)
    seconds["read back"] = building + rates.read * _entries(sources, sources.names)
    for stack in tried.stacks:
        aiming = sum(group.aims for group in stack.groups)
        tries = tried.few * (2 + aiming if settings.expert_stream else 1)
        seconds["forward"] += stack.blocks * stack.seconds * (tried.times * (1 + streams) + tries)
        seconds["merge"] += stack.blocks * stack.size * rates.read * experts * streams
        seconds["read back"] += stack.blocks * stack.seconds * tried.few
        for group in stack.groups:
            for phase, spent in _group(group, settings, tried, rates, experts, place).items():
                seconds[phase] += stack.blocks * spent
    return seconds


def _group(
    group: GroupTrial, settings: Quantize, tried: Tried, rates: Rates, experts: int, place: torch.device
) -> dict[str, float]:
    """Seconds of one group of layers in one block, by phase."""
    n, rows, tokens = group.columns, group.rows, group.tokens * tried.times
    beside = rows if group.aims else n if settings.expert_features else 0
    gathered = moments_seconds(n, place) * tokens * tried.real + rates.product * beside * n * tokens
    gathered += rates.change * tokens * (2 * n + 3 * beside)
    targets, solved = rates.change * 4 * n * n, codes_seconds(n, rows, settings, rates.product, place)
    apart = settings.guided and settings.damping not in (None, settings.anchor_strength)
    solved += (2 if apart else 1) * factor_seconds(n, place)
    if group.aims:
        gathered += rates.change * tokens * (n + 5 * rows)
        targets += rates.change * 2 * rows * n
    elif settings.guided:
        targets += rates.product * rows * n * n + (rates.read + 3 * rates.change) * rows * n
    if settings.guided:
        # The drift, and the loss of merged weights that are not the anchor, take a product each.
        products = bool(group.aims or settings.expert_features) + (settings.anchor_scale not in (None, 1))
        solved += target_seconds(n, rows, place) + rates.product * rows * n * n * products
    solved += rates.change * (8 * rows * n + 4 * n * n)
    return {"moments": gathered, "targets": experts * targets, "solve": solved}


def streaming(settings: Quantize) -> bool:
    """Whether experts run beside the merged model."""
    return bool(settings.expert_features or settings.expert_stream or settings.adapt_heads)


def _entries(sources: Sources, names: list[str]) -> int:
    return sum(math.prod(sources.base_shape(name)) for name in names)


def _stored(sources: Sources, names: list[str]) -> int:
    """Bytes of merged tensors in the dtype on disk."""
    kinds = [sources.stored_dtype(name) or torch.int64 for name in names]
    return sum(math.prod(sources.base_shape(name)) * kind.itemsize for name, kind in zip(names, kinds))


def _journal_bytes(sources: Sources) -> int:
    """Bytes of the finished blocks that a run keeps until its end (`epmq.pipeline.journal.Journal`)."""
    if sources.recipe.quantize.method == "none":
        return 0
    layers, outside = {f"{name}.weight" for name, _ in block_linears(sources.model)}, set(sources.outside_names())
    kept = [name for name in sources.names if name not in layers | outside]
    return sum(math.prod(sources.base_shape(name)) for name in layers) + _stored(sources, kept)


def output_bytes(sources: Sources) -> int:
    """Bytes of all weights that a run writes, from shapes alone."""
    recipe, written = sources.recipe, dict[str, int]()
    for name, layer in block_linears(sources.model) if recipe.quantize.method != "none" else ():
        shape = as_matrix(layer, layer.weight).shape  # type: ignore[arg-type]
        dtype = sources.stored_dtype(f"{name}.weight") or torch.float32
        written[f"{name}.weight"] = FORMATS[recipe.format].stored_bytes(*shape, recipe.quantize.grid, dtype)
    return sum(written.values()) + _stored(sources, [name for name in sources.names if name not in written])


def _held(sources: Sources, tried: Tried | None, written: int) -> float:
    """Bytes that a run holds at its fullest moment, beside what is in memory when all is open."""
    tensors = {name: _stored(sources, [name]) for name in sources.names}
    buffer = min(written, PART_BYTES) + max(tensors.values())
    if tried is None:
        return buffer
    outside, settings = sources.outside_names(), sources.recipe.quantize
    held = sum(tensors[name] for name in outside) + buffer + tried.inputs
    if streaming(settings):
        held += len(sources.experts) * sum(tensors[name] for name in outside)
    return held + max(_fullest(stack, settings, tried) for stack in tried.stacks)


def _fullest(stack: StackTrial, settings: Quantize, tried: Tried) -> float:
    """Bytes that blocks, activations and matrices of a stack take at the fullest moment of a block."""
    streams, moments = streaming(settings), []
    kept = [_kept(group, settings) * tried.times for group in stack.groups]
    passing = 2 * FLOAT * tried.widest * max(group.rows * group.tokens for group in stack.groups)
    before = stack.entry * tried.times
    for i, group in enumerate(stack.groups):
        waiting = group.waiting * tried.times
        gathering = max(before + sum(kept[i:]), waiting + sum(kept[i + 1 :])) + passing
        blocks = 2 if streams and i == 0 else 1
        moments.append(gathering + _gathered(group, settings) + FLOAT * stack.size * blocks)
        moments.append(waiting + sum(kept[i + 1 :]) + _solved(group, settings) + FLOAT * stack.size)
        before = waiting
    return max(moments) + streams * stack.entry * tried.times


def _kept(group: GroupTrial, settings: Quantize) -> float:
    """Bytes of what experts keep for a group, of the examples that were tried."""
    width = group.rows if group.aims else group.columns if settings.expert_features else 0
    return FLOAT * width * group.tokens


def _gathered(group: GroupTrial, settings: Quantize) -> float:
    """Bytes of a group's matrices when one task's moments are folded in: H, the moments twice, the weights."""
    n, rows = group.columns, group.rows
    beside = rows if group.aims else n if settings.expert_features else 0
    weights = 1 + (settings.anchor_scale not in (None, 1)) + 3 * settings.guided
    return FLOAT * n * (3 * n + beside + weights * rows)


def _solved(group: GroupTrial, settings: Quantize) -> float:
    """Bytes of a group's matrices when codes are chosen: H four times, the weights and the solver's copies of them."""
    n, rows = group.columns, group.rows
    weights = 4.5 + (settings.anchor_scale not in (None, 1)) + 2 * settings.guided
    return FLOAT * n * (4 * n + weights * rows)
