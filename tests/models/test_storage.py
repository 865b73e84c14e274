"""How tensors are stored."""

from typing import Any

import torch

from epmq.models.storage import Layout, Storage, join
from epmq.quantization.grid import Grid
from epmq.quantization.rtn import rtn

HALF, EIGHT = torch.float16, Grid(8)


def layout(grid: Grid = EIGHT, **fields: Any) -> Layout:
    table = Storage(torch.float32, grid, HALF)
    of = {
        "table.weight": table,
        "late.weight": table,
        "norm.weight": Storage(HALF),
        "ids": Storage(),
        "kept": Storage(),
    }
    return Layout(of, **fields)


def test_names_within_the_model_itself_are_as_they_are():
    assert join("", "lm_head") == "lm_head" and join("h.0", "up") == "h.0.up"


def test_plain_tensors_are_cast_and_no_others():
    tensor, stored = torch.randn(3, 64), layout()
    assert stored.cast("norm.weight", tensor).dtype == HALF
    for name in ("table.weight", "ids", "unknown"):
        assert stored.cast(name, tensor) is tensor
    target = Layout({"w": Storage(HALF, solved=True)})
    assert target.cast("w", tensor) is tensor  # what is solved is rounded when it has its target


def test_rows_that_come_in_parts_are_rounded_as_the_whole():
    weight = torch.randn(10, 64)
    for grid in (Grid(8), Grid(4, 32, False)):
        whole = layout(grid).round("table.weight", [weight])
        parts = layout(grid).round("table.weight", torch.split(weight, 3))
        expected = rtn(weight, grid, search=True, scale_dtype=HALF)
        for name in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(whole, name), getattr(expected, name))
            assert torch.equal(getattr(whole, name), getattr(parts, name))
        read = layout(grid).as_stored("table.weight", weight)
        codes = whole.codes.reshape(10, -1, grid.width(64)).float() - whole.zero_point.float()[..., None]
        assert (
            torch.equal(read, (codes * whole.scale.float()[..., None]).reshape(10, 64)) and read.dtype == torch.float32
        )


def test_what_is_solved_after_the_last_block_is_read_as_it_is_merged():
    weight, stored = torch.randn(3, 64), layout(late=("late",))
    assert stored.as_stored("late.weight", weight) is weight
    assert not torch.equal(stored.as_stored("table.weight", weight), weight)


def test_other_grids_are_those_of_the_layers_that_are_named():
    stored = layout().with_grids({"table": Grid(4)})
    assert stored.quantized() == {"table": Grid(4), "late": Grid(8)} and stored.grid("table") == Grid(4)
    assert not stored.solves("table") and not stored.solves("unknown")
