"""Solvers: a target W*, a Hessian H and a grid in, codes out.

Both minimise L(Q) = tr((Q − W*) H (Q − W*)ᵀ) over the grid: `rtn` ignores H, `gptq` feeds each column's rounding
error forward to the columns that are still free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epmq.grid import Grid, QuantizedTensor

# Factors on the min–max range that `search_scales` tries.
SHRINKS = tuple(1 - 0.05 * i for i in range(13))


def hessian_loss(delta: Tensor, hessian: Tensor) -> Tensor:
    """tr(Δ H Δᵀ), a row at a time: [out] float32 for Δ [out, in] and H [in, in]."""
    delta = delta.float()
    return ((delta @ hessian) * delta).sum(-1)


def rtn(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32, scales: tuple[Tensor, Tensor] | None = None
) -> QuantizedTensor:
    """Round to nearest.

    Args:
        weight: [out, in], any float dtype.
        grid: the grid.
        scale_dtype: dtype the scales are stored in.
        scales: scale and zero point from `Grid.scales`, if known already.

    Raises:
        ValueError: the group size does not divide the columns.
    """
    scale, zero = scales or grid.scales(weight, scale_dtype)
    grouped = weight.float().reshape(*scale.shape, -1)
    codes = torch.round(grouped / scale.float().unsqueeze(-1)) + zero.unsqueeze(-1)
    codes = codes.clamp(grid.lowest, grid.highest).to(torch.int8).reshape(weight.shape)
    return QuantizedTensor(codes, scale, zero, grid)


def search_scales(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with the least squared rounding error among shrunken min–max ranges, a group at a time.

    Args:
        weight: [out, in], any float dtype.
        grid: the grid.
        scale_dtype: dtype the scales are stored in.
        importance: [in] weight of each column's squared error; None weighs all alike.

    Returns:
        scale [out, groups] in `scale_dtype` and zero point [out, groups] int8.

    Raises:
        ValueError: the group size does not divide the columns.
    """
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for shrink in SHRINKS:
        scale, zero = grid.scales(weight, scale_dtype, shrink)
        squares = (rtn(weight, grid, scales=(scale, zero)).dequantize().float() - weight.float()).square_()
        if importance is not None:
            squares *= importance
        error = squares.reshape(*scale.shape, -1).sum(-1)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, error, least)
    assert best is not None
    return best


def unit_upper_factor(hessian: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """H = U D Uᵀ with U unit upper triangular and D diagonal, by one Cholesky factor of H read backwards.

    Args:
        hessian: [n, n] float, symmetric positive definite.
        order: [n] int64, a permutation in which rows and columns of H are taken; None leaves them where they are.

    Returns:
        U [n, n] and the diagonal of D [n].

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    backwards = order.flip(0)
    # No more names than needed, and one gather for both permutations: H is the largest thing in memory here.
    upper = torch.linalg.cholesky(hessian[backwards[:, None], backwards]).flip(0, 1)
    diagonal = upper.diagonal().clone()
    return upper.div_(diagonal), diagonal.square()


def gptq(
    target: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = True,
    search: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, Tensor]:
    """GPTQ (Frantar et al., arXiv 2210.17323) in LDL form (Chee et al., arXiv 2307.13304, Theorem 6).

    With H = U D Uᵀ the loss is Σ_i D_i (q_i − t_i)² where t_i = w_i + Σ_{j<i} (w_j − q_j) U_ji, so each column is
    rounded to t_i once the columns before it are fixed. This equals the textbook form with the inverse's factor.
    Columns are halved recursively, so that nearly all work is in matrix products.

    Args:
        target: W* [out, in] float32.
        hessian: H [in, in] float32, positive definite.
        grid: the grid.
        act_order: take columns by falling diag(H). Groups stay where they are in the weight (static groups), so
            that nothing but codes, scales and zero points has to be stored.
        search: search the scales (`search_scales`), each column weighed by D_i, what its rounding error costs after
            the feedback; otherwise they are min–max.
        scale_dtype: dtype the scales are stored in.

    Returns:
        the codes, and the loss tr((Q − W*) H (Q − W*)ᵀ) a row, [out] float32.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
        ValueError: the group size does not divide the columns.
    """
    rows, columns = target.shape
    order = torch.arange(columns, device=target.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    feedback, curvature = unit_upper_factor(hessian, order)
    importance = torch.empty_like(curvature)
    importance[order] = curvature
    scale, zero = search_scales(target, grid, scale_dtype, importance) if search else grid.scales(target, scale_dtype)
    group = (order // grid.width(columns)).tolist()
    # Rows are columns of the weight from here on: contiguous in memory, one step of the loop each.
    weight = target.T[order].contiguous()
    free = weight.clone()
    error = torch.empty_like(weight)
    codes = torch.empty(columns, rows, dtype=torch.int8, device=target.device)
    steps, zeros = scale.T.float().contiguous(), zero.T.float().contiguous()
    loss = torch.zeros(rows, device=target.device)

    def solve(start: int, end: int) -> None:
        if end - start > 16:
            middle = (start + end) // 2
            solve(start, middle)
            free[middle:end].addmm_(feedback[start:middle, middle:end].T, error[start:middle])
            solve(middle, end)
            return
        for i in range(start, end):
            step, offset = steps[group[i]], zeros[group[i]]
            code = torch.round(free[i] / step).add_(offset).clamp_(grid.lowest, grid.highest)
            codes[i] = code
            value = code.sub_(offset).mul_(step)
            torch.sub(weight[i], value, out=error[i])
            loss.add_((free[i] - value).square_().mul_(curvature[i]))
            if i + 1 < end:
                free[i + 1 : end].addr_(feedback[i, i + 1 : end], error[i])

    solve(0, columns)
    placed = torch.empty_like(codes)
    placed[order] = codes
    return QuantizedTensor(placed.T.contiguous(), scale, zero, grid), loss
