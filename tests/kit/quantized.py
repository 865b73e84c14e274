"""Quantized tensors with random codes."""

from __future__ import annotations

import torch

from epmq.quantization.grid import Grid, QuantizedTensor


def quantized_tensor(
    grid: Grid, rows: int = 5, columns: int = 64, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """Random codes and zero points on a grid, with scales of a dtype."""
    groups, (low, high) = columns // grid.width(columns), (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1))
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    zero = torch.randint(low, high, (rows, groups), dtype=torch.int8)
    scale = torch.rand(rows, groups).to(dtype)
    return QuantizedTensor(codes, scale, torch.zeros_like(zero) if grid.symmetric else zero, grid)
