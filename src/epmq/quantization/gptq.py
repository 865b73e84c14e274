"""Solvers: a target W*, a Hessian H and a grid in, codes out.

Both minimise L(Q) = tr((Q − W*) H (Q − W*)ᵀ) over the grid: `rtn` ignores H, `gptq` feeds each column's rounding
error forward to the columns that are still free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.matmul import matmul
from epmq.quantization.factor import Factor, factorize
from epmq.quantization.grid import Grid, QuantizedTensor

# Factors on the min–max range that `search_scales` tries.
SHRINKS = tuple(1 - 0.05 * i for i in range(13))
# Entries of a weight whose scales are searched at once on a CPU.
PIECE = 1 << 18
# Columns that are rounded before what they mean for the others goes through one matrix product.
BLOCK = 128
# Blocks are twice as wide where a weight has at least so many columns: the product's rate counts for more there.
WIDE = 2048
# Columns within a block that are rounded one by one, without a matrix product.
PANEL = 16
# Rows of a solution that are compared with rounding to nearest.
CHECKED = 64
# Share of a loss that may be lost to rounding of numbers in comparing two.
SLACK = 1e-3


def hessian_loss(delta: Tensor, hessian: Tensor) -> Tensor:
    """tr(Δ H Δᵀ), a row at a time: [out] float32 for Δ [out, in] and H [in, in]."""
    delta = delta.float()
    return matmul(delta, hessian).mul_(delta).sum(-1)


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


def rtn_fallback(
    solved: QuantizedTensor, loss: Tensor, target: Tensor, hessian: Tensor
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Check a solution against rounding to nearest on its own scales, under the same H.

    Some rows, spread evenly, stand for all: they share the factor, and with it whatever may be wrong with it. Where
    rounding loses less on these, every row takes whichever codes lose less.

    Args:
        solved: the codes.
        loss: tr((Q − W*) H (Q − W*)ᵀ) a row, [out] float32.
        target: W* [out, in] float32.
        hessian: H [in, in] float32.

    Returns:
        codes and losses that are no worse, and which rows were exchanged, [out] booleans.

    Raises:
        ValueError: scales or losses are not finite.
    """
    largest = solved.scale.abs().max() * -solved.grid.lowest  # in the dtype of the scales, as weights are
    if not (torch.isfinite(largest) and torch.isfinite(loss).all()):
        raise InputError("scales or losses are not finite: weights or inputs are too large for their dtype")
    some = torch.arange(0, len(target), -(-len(target) // CHECKED), device=target.device)
    exchanged = torch.zeros(len(target), dtype=torch.bool, device=target.device)
    if float(_nearest(solved, target, hessian, some)[1].sum()) >= (1 - SLACK) * float(loss[some].sum()):
        return solved, loss, exchanged
    codes, lost = _nearest(solved, target, hessian, torch.arange(len(target), device=target.device))
    exchanged = lost < (1 - SLACK) * loss
    codes = torch.where(exchanged[:, None], codes, solved.codes)
    return replace(solved, codes=codes), torch.where(exchanged, lost, loss), exchanged


def _nearest(solved: QuantizedTensor, target: Tensor, hessian: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and losses of some rows rounded to nearest on the scales of a solution."""
    scales = solved.scale[rows].float(), solved.zero_point[rows]
    found = rtn(target[rows], solved.grid, scales=scales)
    return found.codes, hessian_loss(found.dequantize() - target[rows], hessian)


class _Block:
    """Some columns of the weight in the order in which they are taken, and the operations that fix them.

    A column takes a handful of operations on short vectors, and calling them takes about as long as what they do. So
    views and arguments are made once, on buffers that every block is loaded into.

    Attributes:
        weight: W* of these columns, [columns, rows]; like the buffers below.
        wanted: W* and the feedback from the columns that are fixed already; when run, t.
        step: the scales.
        bounds: least and greatest code less the zero point, so that a level is its code times the step; one row of
            each on a symmetric grid.
        code: result, codes less the zero point.
        error: result, W* − Q.
        feedback: U of these columns, [columns, columns].
    """

    def __init__(self, columns: int, like: Tensor, grid: Grid) -> None:
        rows = like.shape[0]
        self.weight, self.wanted, self.step, self.code, self.error = like.new_empty(5, columns, rows).unbind()
        self.feedback = like.new_empty(columns, columns)
        # Bounds are vectors on every grid: torch clamps by them faster than by numbers.
        self.bounds = like.new_tensor([grid.lowest, grid.highest])[:, None, None].repeat(1, 1, rows)
        if not grid.symmetric:
            self.bounds = self.bounds.repeat(1, columns, 1)
        self.operations: list[Callable[[], Any]] = []
        self._plan(0, columns)

    def _plan(self, start: int, end: int) -> None:
        """Columns from the last to the first, halved recursively: nearly all work is in matrix products."""
        if end - start > PANEL:
            middle = (start + end) // 2
            self._plan(middle, end)
            free, fixed = slice(start, middle), slice(middle, end)
            self.operations.append(partial(self.wanted[free].addmm_, self.feedback[free, fixed], self.error[fixed]))
            self._plan(start, middle)
            return
        errors = self.error[start:end].T
        buffers = (self.weight, self.wanted, self.step, self.code, self.error)
        columns = list(zip(*(buffer[start:end].unbind() for buffer in buffers)))
        shares = self.feedback[start:end, start:end].unbind()
        lowest, highest = (bound.expand_as(self.code)[start:end].unbind() for bound in self.bounds)
        for i in reversed(range(end - start)):
            weight, wanted, step, code, error = columns[i]
            if i + 1 < end - start:
                self.operations.append(partial(wanted.addmv_, errors[:, i + 1 :], shares[i][i + 1 :]))
            self.operations += [
                partial(torch.div, wanted, step, out=code),
                code.round_,
                partial(code.clamp_, lowest[i], highest[i]),
                partial(torch.addcmul, weight, code, step, value=-1, out=error),
            ]

    def run(self) -> None:
        """Fix the columns that are in the buffers."""
        for operation in self.operations:
            operation()


def gptq(
    target: Tensor,
    hessian: Tensor | Factor,
    grid: Grid,
    *,
    act_order: bool = True,
    search: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, Tensor]:
    """GPTQ (Frantar et al., arXiv 2210.17323) in LDL form (Chee et al., arXiv 2307.13304, Theorem 6).

    With H = Uᵀ D U the loss is Σ_i D_i (q_i − t_i)² where t_i = w_i + Σ_{j>i} U_ij (w_j − q_j), so each column is
    rounded to t_i once the columns after it are fixed, from the last to the first. This equals the textbook form with
    the inverse's factor.

    Args:
        target: W* [out, in] float32.
        hessian: H [in, in] float32, positive definite; or its factor, which says in what order columns are taken.
        grid: the grid.
        act_order: take columns by falling diag(H), where H is given. Groups stay where they are in the weight (static
            groups), so that nothing but codes, scales and zero points has to be stored.
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
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, act_order)
    order, feedback, curvature = factor.order, factor.upper, factor.curvature
    importance = torch.empty_like(curvature)
    importance[order] = curvature
    scale, zero = search_scales(target, grid, scale_dtype, importance) if search else grid.scales(target, scale_dtype)
    # Rows are columns of the weight from here on, contiguous in memory; errors W* − Q are in the order in which they
    # are taken.
    weight, steps, zeros = (part.T.to(target.dtype).contiguous() for part in (target, scale, zero))
    errors = torch.empty_like(weight)
    group = order // grid.width(columns)
    bounds = target.new_tensor([grid.lowest, grid.highest])[:, None, None]
    width = BLOCK if columns < WIDE else 2 * BLOCK
    loss = torch.zeros_like(target[:, 0])
    codes = torch.empty(columns, rows, dtype=torch.int8, device=target.device)
    with torch.inference_mode():  # for calls that cost less
        blocks = {size: _Block(size, target, grid) for size in {len(part) for part in order.split(width)}}
        for start in reversed(range(0, columns, width)):
            part, rest = slice(start, start + width), slice(start + width, columns)
            own = group[part]
            block = blocks[len(own)]
            torch.index_select(weight, 0, order[part], out=block.weight)
            torch.index_select(steps, 0, own, out=block.step)
            if not grid.symmetric:
                torch.sub(bounds, zeros.index_select(0, own), out=block.bounds)
            block.feedback.copy_(feedback[part, part])
            torch.add(block.weight, matmul(feedback[part, rest], errors[rest]), out=block.wanted)
            block.run()
            errors[part] = block.error
            codes[part] = block.code if grid.symmetric else block.code + zeros.index_select(0, own)
            loss.addmv_(block.wanted.addcmul_(block.code, block.step, value=-1).square_().T, curvature[part])
    return QuantizedTensor(codes.index_select(0, torch.argsort(order)).T.contiguous(), scale, zero, grid), loss
