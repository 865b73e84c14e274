"""Quantized tensors with random codes."""

from __future__ import annotations

from typing import Any

import torch

from epmq.quantization.grid import Grid, QuantizedTensor

# Settings of a quantizer under which all that lies outside the blocks is stored as it is merged, in its own dtype.
PLAIN_OUTSIDE: dict[str, Any] = {
    "embeddings": 16,
    "output_layer": 16,
    "rest": "as-stored",
    "scale_dtype": "as-stored",
}


def quantized_tensor(
    grid: Grid, rows: int = 5, columns: int = 64, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """Random codes and zero points on a grid, with scales of a dtype."""
    groups, (low, high) = columns // grid.width(columns), (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1))
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    zero = torch.randint(low, high, (rows, groups), dtype=torch.int8)
    scale = torch.rand(rows, groups).to(dtype)
    return QuantizedTensor(codes, scale, torch.zeros_like(zero) if grid.symmetric else zero, grid)
