"""Rounding to nearest: a solver that ignores H, and what every other solver is held against."""

from dataclasses import replace

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.scales import search_scales

# Rows of a solution that are compared with rounding to nearest first, evenly spread.
SAMPLED_ROWS = 64
# Relative difference between two losses that may come from the rounding of floats alone.
TOLERANCE = 1e-3


def rtn(
    target: Tensor, grid: Grid, *, search: bool = False, scale_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Round a weight [out, in] of any float dtype to nearest.

    Other arguments and errors as in `gptq`; a search of scales weighs all columns alike.
    """
    scale, zero = search_scales(target, grid, scale_dtype) if search else grid.scales(target, scale_dtype)
    return round_with(target, grid, scale, zero)


def round_with(target: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor) -> QuantizedTensor:
    """Round [out, in] to nearest with scales [out, groups], all of any float dtype, and zero points of int8."""
    grouped = target.float().reshape(*scale.shape, -1)
    codes = torch.round(grouped / scale.float().unsqueeze(-1)) + zero_point.unsqueeze(-1)
    codes = codes.clamp(grid.lowest, grid.highest).to(torch.int8).reshape(target.shape)
    return QuantizedTensor(codes, scale, zero_point, grid)


def rtn_fallback(
    solved: QuantizedTensor, loss: Tensor, target: Tensor, hessian: Tensor
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Check a solution against rounding to nearest on its own scales, under the same H.

    Some rows, spread evenly, stand for all: they share the factor, and with it whatever may be wrong with it. Where
    rounding loses less on these, every row takes whichever codes lose less. Codes and losses come from `gptq`, the
    target W* [out, in] and the Hessian H [in, in] are float32.

    Returns:
        codes and losses that are no worse, and which rows were exchanged, [out] booleans.

    Raises:
        ValueError: scales or losses are not finite.
    """
    largest = solved.scale.abs().max() * -solved.grid.lowest  # in the dtype of the scales, as weights are
    if not (torch.isfinite(largest) and torch.isfinite(loss).all()):
        raise InputError("scales or losses are not finite: weights or inputs are too large for their dtype")
    rows = torch.arange(len(target), device=target.device)
    sampled = rows[:: -(-len(rows) // SAMPLED_ROWS)]
    if float(_nearest(solved, target, hessian, sampled)[1].sum()) >= (1 - TOLERANCE) * float(loss[sampled].sum()):
        return solved, loss, torch.zeros_like(rows, dtype=torch.bool)
    nearest, nearest_loss = _nearest(solved, target, hessian, rows)
    exchanged = nearest_loss < (1 - TOLERANCE) * loss
    codes = torch.where(exchanged[:, None], nearest, solved.codes)
    return replace(solved, codes=codes), torch.where(exchanged, nearest_loss, loss), exchanged


def _nearest(solved: QuantizedTensor, target: Tensor, hessian: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and losses of some rows rounded to nearest on the scales of a solution."""
    nearest = round_with(target[rows], solved.grid, solved.scale[rows].float(), solved.zero_point[rows])
    return nearest.codes, hessian_loss(nearest.dequantize() - target[rows], hessian)
