"""GPTQ: each column's rounding error is fed forward to the columns that are still free."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epmq.matmul import matmul
from epmq.quantization import recording
from epmq.quantization.factor import Factor, factorize
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.recording import Recorded, Shelf
from epmq.quantization.scales import search_scales

# Columns that are rounded before what they mean for the others goes through one matrix product.
BLOCK = 128
# Blocks are twice as wide where a weight has at least so many columns: the product's rate counts for more there.
WIDE = 2048
# Columns within a block that are rounded one by one, without a matrix product.
PANEL = 16
# Bytes on GPUs that blocks with their recordings may take between two weights: those of all shapes in most models.
KEPT_BYTES = 256 << 20


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

    It minimises tr((Q − W*) H (Q − W*)ᵀ) over the grid greedily. The textbook takes one column after the other, in the
    order of falling diag(H) if `act_order`:

        W, R = target[:, order], cholesky(inv(H[order, order]), upper=True)
        for i in range(columns):
            Q[:, i] = nearest_level(W[:, i])
            W[:, i:] -= outer((W[:, i] - Q[:, i]) / R[i, i], R[i, i:])

    What is computed here is the same without the inverse. With H = Uᵀ D U the loss is Σ_i D_i (q_i − t_i)² where
    t_i = w_i + Σ_{j>i} U_ij (w_j − q_j), so each column is rounded to t_i once the columns after it are fixed, from
    the last to the first. U has the order turned round, see `Factor`.

    Args:
        target: W* [out, in] float32.
        hessian: H [in, in] float32, positive definite; or its factor, which says in what order columns are taken.
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
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, act_order)
    importance = torch.empty_like(factor.curvature)
    importance[factor.order] = factor.curvature
    scale, zero = search_scales(target, grid, scale_dtype, importance) if search else grid.scales(target, scale_dtype)
    codes, loss = _choose_codes(target, factor, grid, scale, zero)
    return QuantizedTensor(codes, scale, zero, grid), loss


def _choose_codes(target: Tensor, factor: Factor, grid: Grid, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int8 and the loss a row [out], given scales and zero points [out, groups]."""
    rows, columns = target.shape
    order, feedback = factor.order, factor.upper
    # Rows are columns of the weight from here on, contiguous in memory; errors W* − Q are in the order in which they
    # are taken.
    weight, scales, zeros = (part.T.to(target.dtype).contiguous() for part in (target, scale, zero))
    errors = torch.empty_like(weight)
    groups = order // grid.width(columns)
    bounds = target.new_tensor([grid.lowest, grid.highest])[:, None, None]
    width = BLOCK if columns < WIDE else 2 * BLOCK
    loss = torch.zeros_like(target[:, 0])
    codes = torch.empty(columns, rows, dtype=torch.int8, device=target.device)
    with torch.inference_mode():  # for calls that cost less
        blocks = {size: _take(size, target, grid) for size in {len(part) for part in torch.split(order, width)}}
        for start in reversed(range(0, columns, width)):
            free, fixed = slice(start, start + width), slice(start + width, columns)
            group = groups[free]
            block = blocks[len(group)]
            torch.index_select(weight, 0, order[free], out=block.weight)
            torch.index_select(scales, 0, group, out=block.scale)
            if not grid.symmetric:
                torch.sub(bounds, zeros.index_select(0, group), out=block.bounds)
            block.feedback.copy_(feedback[free, free])
            torch.add(block.weight, matmul(feedback[free, fixed], errors[fixed]), out=block.compensated)
            block.run()
            errors[free] = block.error
            codes[free] = block.code if grid.symmetric else block.code + zeros.index_select(0, group)
            residual = block.compensated.addcmul_(block.code, block.scale, value=-1)
            loss.addmv_(residual.square_().T, factor.curvature[free])
    for size, block in blocks.items():
        if block.recorded:
            _kept.put(_key(size, target, grid), block)
    return codes.index_select(0, torch.argsort(order)).T.contiguous(), loss


class _Block:
    """Some columns of the weight in the order in which they are taken, and the operations that fix them.

    A column takes a handful of operations on short vectors, and calling them takes about as long as what they do. So
    views and arguments are made once, on buffers that every block is loaded into. On a GPU calling takes several times
    as long as what they do (`benchmarks/results/device.json`), so there they are recorded.

    Attributes:
        operations: what fixes the columns; all of it computes in the buffers.
        recorded: the operations as a GPU replays them, None elsewhere.
        nbytes: bytes of the buffers.
    """

    def __init__(self, columns: int, like: Tensor, grid: Grid) -> None:
        rows = like.shape[0]
        # [columns, rows] each: W*; t, once the feedback of the block's own columns is in it; scales; codes less the
        # zero point and errors W* − Q, which are the results.
        self.weight, self.compensated, self.scale, self.code, self.error = like.new_empty(5, columns, rows).unbind()
        self.feedback = like.new_empty(columns, columns)  # U of these columns
        # Least and greatest code less the zero point, so that a level is its code times the scale; one row of each on
        # a symmetric grid. They are vectors on every grid: torch clamps by them faster than by numbers.
        self.bounds = like.new_tensor([grid.lowest, grid.highest])[:, None, None].repeat(1, 1, rows)
        if not grid.symmetric:
            self.bounds = self.bounds.repeat(1, columns, 1)
        self.operations: list[Callable[[], Any]] = []
        self._plan(0, columns)
        gpu = recording.gpu_of(like.device)
        self.recorded = Recorded(self.operations, gpu) if gpu else None
        self.nbytes = 5 * self.weight.nbytes + self.feedback.nbytes + self.bounds.nbytes

    def _plan(self, start: int, end: int) -> None:
        """Columns from the last to the first, halved recursively: nearly all work is in matrix products."""
        if end - start > PANEL:
            middle = (start + end) // 2
            self._plan(middle, end)
            free, fixed = slice(start, middle), slice(middle, end)
            self.operations.append(
                partial(self.compensated[free].addmm_, self.feedback[free, fixed], self.error[fixed])
            )
            self._plan(start, middle)
            return
        errors = self.error[start:end].T
        buffers = (self.weight, self.compensated, self.scale, self.code, self.error)
        columns = list(zip(*(buffer[start:end].unbind() for buffer in buffers)))
        feedback_rows = self.feedback[start:end, start:end].unbind()
        lowest, highest = (bound.expand_as(self.code)[start:end].unbind() for bound in self.bounds)
        for i in reversed(range(end - start)):
            weight, compensated, scale, code, error = columns[i]
            if i + 1 < end - start:
                self.operations.append(partial(compensated.addmv_, errors[:, i + 1 :], feedback_rows[i][i + 1 :]))
            self.operations += [
                partial(torch.div, compensated, scale, out=code),
                code.round_,
                partial(code.clamp_, lowest[i], highest[i]),
                partial(torch.addcmul, weight, code, scale, value=-1, out=error),
            ]

    def run(self) -> None:
        """Fix the columns that are in the buffers."""
        if self.recorded:
            self.recorded.run()
        else:
            self.call()

    def call(self) -> None:
        """The same, operation by operation."""
        for operation in self.operations:
            operation()


_kept = Shelf[_Block](KEPT_BYTES)


def _take(columns: int, like: Tensor, grid: Grid) -> _Block:
    """A block that another weight has left, with its recording, or a new one."""
    left = _kept.take(_key(columns, like, grid)) if recording.gpu_of(like.device) else None
    return left or _Block(columns, like, grid)


def _key(columns: int, like: Tensor, grid: Grid) -> Hashable:
    """What weights must have in common to use the same block; a recording holds products of one precision."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return columns, like.shape[0], like.dtype, like.device, grid.bits, grid.symmetric, precision
