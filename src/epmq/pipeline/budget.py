"""A limit of size: whether it can be kept, and the grids that keep it at the least cost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress
from torch import nn

from epmq.calibration.allocation import Costs, MeasuringEngine, choose_grids, table_costs
from epmq.calibration.engine import block_names
from epmq.calibration.sequential import Batch
from epmq.errors import InputError
from epmq.files import read_json, write_json
from epmq.models.checkpoint import bits_per_weight, byte_size
from epmq.pipeline.output import parameters_of, specs_of, weight_specs
from epmq.pipeline.prepare import PreparedRun
from epmq.quantization.grid import Grid

# Where the choice is kept beside the finished blocks of a run.
CHOICE = "grids"


def limit_bytes(run: PreparedRun) -> int | None:
    """Bytes that all weights may take; None without a limit."""
    settings = run.recipe.quantize
    if settings.budget is not None:
        return int(settings.budget * parameters_of(run) / 8)
    return settings.size


def check_budget(run: PreparedRun) -> None:
    """Check that the limit can be kept; an InputError says what it takes at the least."""
    limit = limit_bytes(run)
    if limit is None:
        return
    settings, sizes = run.recipe.quantize, _sizes(run)
    least = _fixed(run) + sum(min(own.values()) for own in sizes.values())
    if least > limit:
        bits = bits_per_weight(least, parameters_of(run))
        asked = f"budget: {settings.budget:g}" if settings.budget is not None else f"size: {limit} bytes"
        raise InputError(
            f"quantize.{asked} is too little: with the smallest grids it is {least} bytes, {bits:.2f} bits a weight"
        )


def with_chosen_grids(run: PreparedRun, batches: Sequence[Batch], folder: Path, bar: Progress) -> PreparedRun:
    """The run with the grids that keep its limit; what was chosen before, in `folder`, is taken again."""
    if not run.layout.free:
        return run
    file = folder / CHOICE
    if not file.exists():
        limit = limit_bytes(run)
        assert limit is not None
        chosen = choose_grids(_costs(run, batches, bar), _sizes(run), limit - _fixed(run))
        write_json(file, {layer: [grid.bits, grid.group_size, grid.symmetric] for layer, grid in chosen.items()})
    grids = {layer: Grid(*fields) for layer, fields in read_json(file).items()}
    return replace(run, layout=run.layout.with_grids(grids))


def _sizes(run: PreparedRun) -> dict[str, dict[Grid, int]]:
    """Bytes of each layer whose grid is to be chosen, on each that it may have."""
    return {layer: {grid: _bytes(run, layer, grid) for grid in grids} for layer, grids in run.layout.free.items()}


def _bytes(run: PreparedRun, layer: str, grid: Grid | None = None) -> int:
    return sum(map(byte_size, specs_of(run, f"{layer}.weight", grid).values()))


def _fixed(run: PreparedRun) -> int:
    """Bytes of everything else."""
    whole = sum(map(byte_size, weight_specs(run).values()))
    return whole - sum(_bytes(run, layer) for layer in run.layout.free)


def _costs(run: PreparedRun, batches: Sequence[Batch], bar: Progress) -> Costs:
    """What every layer costs on every grid that it may have."""
    from epmq.pipeline.run import calibration_engine

    engine = calibration_engine(run, list(batches), engine_class=MeasuringEngine)
    assert isinstance(engine, MeasuringEngine)
    blocks = len(block_names(run.experts)) + bool(run.layout.late)
    for _ in bar.track(engine, total=blocks, description="measure every layer at every width"):
        pass
    free = run.layout.free
    lacking = [layer for layer in free if layer not in engine.costs]
    tables = [layer for layer in lacking if isinstance(run.experts.model.get_submodule(layer), nn.Embedding)]
    readers = {table: _readers(run, table) for table in tables}
    costs = {**engine.costs, **table_costs(run.layout, run.merged, batches, readers)}
    # What no data reaches costs nothing, and gets the smallest grid.
    return {layer: costs.get(layer, dict.fromkeys(grids, 0.0)) for layer, grids in free.items()}


def _readers(run: PreparedRun, table: str) -> int:
    """How many ways a table is read: looked up, and as an output layer where one is tied to it."""
    output = set(run.experts.output_layer())
    return 1 + any(leader == f"{table}.weight" and name in output for name, leader in run.experts.tied.items())
