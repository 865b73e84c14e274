"""Solvers: a target W*, a Hessian H and a grid in, codes out.

Both minimise L(Q) = tr((Q − W*) H (Q − W*)ᵀ) over the grid: `rtn` ignores H, `gptq` feeds each column's rounding
error forward to the columns that are still free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epmq.grid import Grid, QuantizedTensor

# Factors on the min–max range that `search_scales` tries.
SHRINKS = tuple(1 - 0.05 * i for i in range(13))
# Entries of a weight whose scales are searched at once on a CPU.
PIECE = 1 << 16
# Rows of H that are factored at once on a CPU; what they mean for the others goes through matrix products.
BLOCK = 128
# Columns that are rounded one by one, likewise.
PANEL = 16


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
    step = len(weight) if weight.device.type != "cpu" else max(1, PIECE // weight.shape[1])
    found = [_search(rows, grid, scale_dtype, importance) for rows in weight.split(step)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search(weight: Tensor, grid: Grid, scale_dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """`search_scales` on rows that fit a processor's cache."""
    low, high = grid.range(weight)
    grouped = weight.float().reshape(*low.shape, -1)
    weigh = None if importance is None else importance.reshape(1, *grouped.shape[1:])
    tried = [grid.divide(low, high, scale_dtype, shrink) for shrink in SHRINKS]
    errors, missed = [], torch.empty_like(grouped)
    for scale, zero in tried:
        step, shift = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
        bounds = (grid.lowest, grid.highest)
        torch.div(grouped, step, out=missed).round_()
        missed.clamp_(*bounds) if grid.symmetric else missed.clamp_(*(bound - shift for bound in bounds))
        missed.mul_(step).sub_(grouped).square_()
        errors.append((missed if weigh is None else missed.mul_(weigh)).sum(-1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    scales, zeros = (torch.stack(parts).gather(0, best)[0] for parts in zip(*tried))
    return scales, zeros


def unit_upper_factor(hessian: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """H = Uᵀ D U with U unit upper triangular and D diagonal, by one Cholesky factor.

    Args:
        hessian: [n, n] float, symmetric positive definite.
        order: [n] int64, a permutation in which rows and columns of H are taken; None leaves them where they are.

    Returns:
        U [n, n] and the diagonal of D [n].

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    upper = hessian.clone() if order is None else hessian.index_select(0, order).index_select(1, order)
    cholesky_(upper, BLOCK if upper.device.type == "cpu" else len(upper))
    diagonal = upper.diagonal().clone()
    return upper.triu_().div_(diagonal[:, None]), diagonal.square()


def cholesky_(matrix: Tensor, block: int) -> None:
    """Put R, A = Rᵀ R, in place of the upper half of A; what is below the diagonal is left as it was.

    By block rows, left-looking (Golub & Van Loan, Matrix Computations, section 4.2).

    Args:
        matrix: A [n, n] float, symmetric positive definite; it is changed.
        block: rows that are factored at once.

    Raises:
        torch.linalg.LinAlgError: A is not positive definite.
    """
    for start in range(0, len(matrix), block):
        rows = matrix[start : start + block, start:]
        width = len(rows)
        if start:
            above = matrix[:start, start:]
            rows.addmm_(above[:, :width].T, above, alpha=-1)
        corner = torch.linalg.cholesky(rows[:, :width], upper=True)
        if width < rows.shape[1]:
            identity = torch.eye(width, dtype=matrix.dtype, device=matrix.device)
            rows[:, width:] = torch.linalg.solve_triangular(corner.T, identity, upper=False) @ rows[:, width:]
        rows[:, :width] = corner


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

    With H = Uᵀ D U the loss is Σ_i D_i (q_i − t_i)² where t_i = w_i + Σ_{j>i} U_ij (w_j − q_j), so each column is
    rounded to t_i once the columns after it are fixed, from the last to the first. This equals the textbook form with
    the inverse's factor. Columns are halved recursively, so that nearly all work is in matrix products.

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
    order = order.flip(0)
    feedback, curvature = unit_upper_factor(hessian, order)
    importance = torch.empty_like(curvature)
    importance[order] = curvature
    scale, zero = search_scales(target, grid, scale_dtype, importance) if search else grid.scales(target, scale_dtype)
    # Rows are columns of the weight from here on: contiguous in memory, one step of the loop each.
    weight = target.T.contiguous().index_select(0, order)
    free = weight.clone()
    error = torch.empty_like(weight)
    codes = torch.empty(columns, rows, dtype=torch.int8, device=target.device)
    loss = torch.zeros(rows, dtype=target.dtype, device=target.device)
    # Codes are clamped less their zero point, so that a level is its code times the step.
    zeros = zero.T.to(target.dtype)
    bounds: list[tuple[Any, Any]] = [(grid.lowest, grid.highest)] * len(zeros)
    if not grid.symmetric:
        bounds = list(zip((grid.lowest - zeros).unbind(), (grid.highest - zeros).unbind()))
    steps = scale.T.to(target.dtype).contiguous().unbind()
    group = order // grid.width(columns)
    groups = group.tolist()
    panel = torch.empty(PANEL, rows, dtype=target.dtype, device=target.device)

    def fix(start: int, end: int) -> None:
        """Fix these columns, one by one."""
        part = slice(start, end)
        taken, errors = panel[: end - start], error[part].T
        views = (weight[part], free[part], error[part], feedback[part, part], taken)
        each = list(zip(groups[part], *(view.unbind() for view in views)))
        for i in range(end - start - 1, -1, -1):
            own, column, wanted, missed, share, code = each[i]
            if i + 1 < end - start:
                wanted.addmv_(errors[:, i + 1 :], share[i + 1 :])
            torch.div(wanted, steps[own], out=code).round_().clamp_(*bounds[own])
            torch.addcmul(column, code, steps[own], value=-1, out=missed)
        loss.addmv_((free[part] - weight[part]).add_(error[part]).square_().T, curvature[part])
        codes[part] = taken if grid.symmetric else taken.add_(zeros[group[part]])

    def solve(start: int, end: int) -> None:
        if end - start <= PANEL:
            fix(start, end)
            return
        middle = (start + end) // 2
        solve(middle, end)
        free[start:middle].addmm_(feedback[start:middle, middle:end], error[middle:end])
        solve(start, middle)

    solve(0, columns)
    placed = torch.empty_like(codes)
    placed[order] = codes
    return QuantizedTensor(placed.T.contiguous(), scale, zero, grid), loss
