"""Bits layer by layer under a limit of size."""

from itertools import product

import pytest
import torch
from conftest import padded_batches
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from odd_families import prepared_run

from epmq.calibration.allocation import MeasuringEngine, choose_grids, table_costs
from epmq.calibration.engine import CalibrationEngine
from epmq.calibration.sequential import Batch
from epmq.errors import InputError
from epmq.models.storage import Layout, Storage
from epmq.pipeline.run import calibration_batches, calibration_engine
from epmq.quantization.grid import Grid
from epmq.quantization.rtn import rtn

GRIDS = tuple(Grid(bits) for bits in (2, 3, 4, 8))
DATA = {"one": padded_batches(2), "two": padded_batches(3)[2:]}


def chosen_cost(costs, sizes, grids):
    return sum(costs[name][grid] for name, grid in grids.items()), sum(
        sizes[name][grid] for name, grid in grids.items()
    )


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 50)), min_size=1, max_size=5), st.floats(0, 1))
def test_no_choice_on_the_convex_hull_is_cheaper(layers, share):
    costs = {str(i): {grid: scale / 4**grid.bits for grid in GRIDS} for i, (scale, _) in enumerate(layers)}
    sizes = {str(i): {grid: size * grid.bits for grid in GRIDS} for i, (_, size) in enumerate(layers)}
    limit = round(sum(size * (2 + 6 * share) for _, size in layers))
    cost, size = chosen_cost(costs, sizes, choose_grids(costs, sizes, limit))
    assert size <= limit
    best = min(
        chosen_cost(costs, sizes, dict(zip(costs, grids)))[0]
        for grids in product(GRIDS, repeat=len(layers))
        if sum(sizes[name][grid] for name, grid in zip(costs, grids)) <= limit
    )
    # What Lagrange's way misses is less than what the dearest single step would save.
    steps = [own[GRIDS[i]] - own[GRIDS[i + 1]] for own in costs.values() for i in range(3)]
    assert best - 1e-9 <= cost <= best + max(steps)


def test_too_small_a_limit_is_an_error():
    with pytest.raises(InputError, match="the smallest grids take 20 bytes, and there are 19"):
        choose_grids({"a": {grid: 1.0 for grid in GRIDS}}, {"a": {grid: 10 * grid.bits for grid in GRIDS}}, 19)


def test_what_costs_nothing_gets_no_more_than_it_must():
    costs = {"a": dict.fromkeys(GRIDS, 0.0), "b": {grid: 1 / grid.bits for grid in GRIDS}}
    sizes = {key: {grid: grid.bits for grid in GRIDS} for key in costs}
    assert choose_grids(costs, sizes, 100) == {"a": GRIDS[0], "b": GRIDS[3]}


def measured(prepared) -> dict[str, dict[Grid, float]]:
    engine = calibration_engine(prepared, calibration_batches(prepared), engine_class=MeasuringEngine)
    list(engine)
    return engine.costs


def budgeted(tmp_path, method):
    return prepared_run(tmp_path, FAMILIES["llama"].build, DATA, method, budget=8.0)


def test_every_layer_costs_less_with_more_bits(tmp_path):
    prepared = budgeted(tmp_path, "expert_guided")
    costs = measured(prepared)
    assert costs.keys() == prepared.layout.free.keys() - {"model.embed_tokens"} and "lm_head" in costs
    for by_grid in costs.values():
        values = [by_grid[grid] for grid in sorted(by_grid, key=lambda grid: grid.bits)]
        assert values == sorted(values, reverse=True) and values[-1] > 0


def test_a_cost_is_the_loss_of_a_run_at_these_bits_in_the_unit_of_the_stream(tmp_path):
    prepared = budgeted(tmp_path, "gptq")
    layout, name = prepared.layout, "model.layers.0.self_attn.q_proj"
    costs = measured(prepared)[name]
    losses = {}
    for grid in layout.free[name]:
        prepared.layout = layout.with_grids({name: grid})
        engine = calibration_engine(prepared, calibration_batches(prepared), engine_class=CalibrationEngine)
        losses[grid] = next(report.loss for report in next(iter(engine)).reports if report.name == name)
    worth = {grid: costs[grid] / losses[grid] for grid in costs}
    assert max(worth.values()) == pytest.approx(min(worth.values()), rel=1e-4)


def test_a_table_costs_what_rounding_moves_of_the_rows_that_are_looked_up():
    table = torch.randn(10, 32)
    ids = torch.tensor([[1, 2, 2], [3, 2, 1]])
    layout = Layout({"t.weight": Storage(torch.float32, GRIDS[0], torch.float32)}, free={"t": GRIDS})
    reader = type("Reader", (), {"tensor": lambda self, name: table})()
    costs = table_costs(layout, reader, [Batch("one", 0, {"input_ids": ids})], {"t": 2})
    for grid in GRIDS:
        delta = rtn(table, grid, search=True).dequantize() - table
        shares = delta.square().sum(1) / table.square().sum(1)
        assert costs["t"][grid] == pytest.approx(2 * float(shares[ids].mean()), rel=1e-5)
    pictures = [Batch("one", 0, {"pixel_values": torch.randn(2, 3, 4, 4)})]
    costs = table_costs(layout, reader, pictures, {"t": 1})
    assert costs["t"][grid] == pytest.approx(float(shares.mean()), rel=1e-5)
