"""Blocks of GGUF hold codes bit for bit, read back by gguf's own code."""

import numpy as np
import pytest
import torch

from epmq.export.gguf_blocks import block_type, pack_rows
from epmq.quantization.grid import Grid, QuantizedTensor

gguf = pytest.importorskip("gguf")

GRIDS = [
    (Grid(4, 32), 96, "Q4_0"),
    (Grid(4, -1), 256, "Q4_0"),
    (Grid(3, 64), 128, "Q4_0"),
    (Grid(3, 32, False), 96, "Q4_0"),
    (Grid(2, 32, False), 64, "Q4_0"),
    (Grid(3, -1, False), 256, "Q4_0"),
    (Grid(4, 32, False), 96, "Q5_0"),
    (Grid(4, -1, False), 96, "Q5_0"),
    (Grid(8, -1), 96, "Q8_0"),
    (Grid(8, 128), 256, "Q8_0"),
    (Grid(2, -1), 512, "Q2_K"),
    (Grid(2, -1, False), 512, "Q2_K"),
    (Grid(3, -1), 512, "Q3_K"),
    (Grid(4, -1, False), 512, "Q4_K"),
]


def codes_on(grid: Grid, rows: int, columns: int) -> QuantizedTensor:
    """A tensor on a grid with all its codes and zero points."""
    generator = torch.Generator().manual_seed(0)
    bounds, groups = (grid.lowest, grid.highest + 1), columns // grid.width(columns)
    codes = torch.randint(*bounds, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0, :2] = torch.tensor([grid.lowest, grid.highest])
    zero = torch.zeros((rows, groups), dtype=torch.int8)
    if not grid.symmetric:
        zero = torch.randint(*bounds, zero.shape, generator=generator, dtype=torch.int8)
        zero[:2, 0] = torch.tensor([grid.lowest, grid.highest])
    scale = torch.rand((rows, groups), generator=generator).to(torch.float16)
    scale[1, 0] = 2.0**-24  # the least that float16 holds
    return QuantizedTensor(codes, scale, zero, grid, torch.float32)


@pytest.mark.parametrize("grid, columns, name", GRIDS, ids=str)
def test_blocks_hold_codes_bit_for_bit(grid, columns, name):
    weight, kind = codes_on(grid, 7, columns), block_type(grid, columns)
    assert kind is not None and kind.name == name
    packed = np.concatenate(list(pack_rows(weight, kind)))
    assert packed.shape == (7, columns // kind.weights * kind.bytes) and packed.dtype == np.uint8
    plain = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    assert np.array_equal(plain, weight.dequantize().numpy())


def test_many_rows_are_packed_in_parts(monkeypatch):
    weight = codes_on(Grid(4, 32), 9, 64)
    whole = np.concatenate(list(pack_rows(weight, block_type(weight.grid, 64))))
    monkeypatch.setattr("epmq.export.gguf_blocks.CHUNK", 128)
    parts = list(pack_rows(weight, block_type(weight.grid, 64)))
    assert len(parts) == 5 and np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("grid, columns", [(Grid(4, -1), 40), (Grid(8, -1, False), 64), (Grid(8, 32, False), 256)])
def test_what_no_block_holds_has_no_type(grid, columns):
    assert block_type(grid, columns) is None
