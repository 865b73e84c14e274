"""Scales with the least squared rounding error."""

import torch
from torch import Tensor

from epmq.quantization.grid import Grid

# Factors on the min–max range that `search_scales` tries.
SHRINKS = tuple(1 - 0.05 * i for i in range(13))
# Entries of a weight whose scales are searched at once on a CPU: they fit its cache.
CHUNK = 1 << 18


def search_scales(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with the least squared rounding error among shrunken min–max ranges, a group at a time.

    As `Grid.scales`; `importance` [in] is the weight of each column's squared error, None weighs all alike.
    """
    rows = len(weight) if weight.device.type != "cpu" else max(1, CHUNK // weight.shape[1])
    scales, zeros = zip(*(_search(chunk, grid, scale_dtype, importance) for chunk in torch.split(weight, rows)))
    return torch.cat(scales), torch.cat(zeros)


def _search(weight: Tensor, grid: Grid, scale_dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """`search_scales` on some rows."""
    low, high = grid.range(weight)
    grouped = weight.float().reshape(*low.shape, -1)
    grouped_importance = None if importance is None else importance.reshape(1, *grouped.shape[1:])
    candidates = [grid.divide(low, high, scale_dtype, shrink) for shrink in SHRINKS]
    losses, error = [], torch.empty_like(grouped)
    for candidate_scale, candidate_zero in candidates:
        scale, zero = candidate_scale.float().unsqueeze(-1), candidate_zero.float().unsqueeze(-1)
        bounds = (grid.lowest, grid.highest)
        torch.div(grouped, scale, out=error).round_()
        error.clamp_(*bounds) if grid.symmetric else error.clamp_(*(bound - zero for bound in bounds))
        error.mul_(scale).sub_(grouped).square_()
        losses.append((error if grouped_importance is None else error.mul_(grouped_importance)).sum(-1))
    best = torch.stack(losses).argmin(0, keepdim=True)
    scales, zeros = (torch.stack(parts).gather(0, best)[0] for parts in zip(*candidates))
    return scales, zeros
