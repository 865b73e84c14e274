"""The factor of a Hessian: what solving for the target and choosing codes share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq.matmul import addmm_, matmul

# Columns that are factored or solved for before what they mean for the others goes through one matrix product.
BLOCK = 128
# With so many columns blocks are factored in panels of four: the product takes a copy of all that is done already.
WIDE = 8192


@dataclass(frozen=True)
class Factor:
    """H = Uᵀ D U with rows and columns of H in the order in which GPTQ takes them, last first.

    What lies below the diagonal blocks of `upper` was never written and is not to be read: `torch.triu` gives U alone.
    """

    order: Tensor  # [n] int64, which column of H each column of U is
    upper: Tensor  # U [n, n], unit upper triangular, in the dtype of H
    curvature: Tensor  # the diagonal of D [n], in the same

    def solve(self, right: Tensor) -> Tensor:
        """R H⁻¹, that is (U⁻¹ D⁻¹ U⁻ᵀ Rᵀ)ᵀ in the order of the factor, by blocks.

        R [rows, n] has its columns as H; what is returned is like it, contiguous. Both are in the dtype of the factor.
        """
        remaining = right.T.contiguous().index_select(0, self.order)
        solution, blocks = torch.empty_like(remaining), _blocks(len(self.order), BLOCK)
        inverses = [self._corner_inverse(*block) for block in blocks]
        for (start, end), inverse in zip(blocks, inverses):
            rows = remaining[start:end]
            if start:
                addmm_(rows, self.upper[:start, start:end].T, solution[:start], alpha=-1)
            solution[start:end] = matmul(inverse.T, rows)
        remaining, solution = solution.div_(self.curvature[:, None]), remaining
        for (start, end), inverse in zip(reversed(blocks), reversed(inverses)):
            rows = remaining[start:end]
            if end < len(self.order):
                addmm_(rows, self.upper[start:end, end:], solution[end:], alpha=-1)
            solution[start:end] = matmul(inverse, rows)
        return solution.index_select(0, torch.argsort(self.order)).T.contiguous()

    def _corner_inverse(self, start: int, end: int) -> Tensor:
        """The inverse of a diagonal block of U."""
        corner = self.upper[start:end, start:end]
        identity = torch.eye(end - start, dtype=corner.dtype, device=corner.device)
        inverse: Tensor = torch.linalg.solve_triangular(corner, identity, upper=True, unitriangular=True)
        return inverse


def factorize(hessian: Tensor, act_order: bool = True) -> Factor:
    """Factor a Hessian, by block rows, left-looking (Golub & Van Loan, Matrix Computations, section 4.2).

    Each block row is taken from H when it is its turn, so that H is never copied whole. LAPACK's Cholesky rounds
    otherwise with another number of threads; this does not.

    Args:
        hessian: [n, n] float, symmetric positive definite.
        act_order: GPTQ is to take columns by falling diag(H); otherwise as they are.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    order = order.flip(0)
    upper, curvature = torch.empty_like(hessian), torch.empty_like(hessian[0])
    # An accelerator's own factorization is faster than one that waits for every block's corner.
    block = BLOCK if hessian.device.type == "cpu" else len(hessian)
    for first, last in _blocks(len(hessian), block if len(hessian) < WIDE else 4 * block):
        panel = hessian.index_select(0, order[first:last]).index_select(1, order[first:])
        if first:
            _subtract_done(panel, upper, curvature, slice(0, first), slice(first, last))
        for start, end in _blocks(last - first, block):
            rows, block_rows = panel[start:end, start:], slice(first + start, first + end)
            if start:
                _subtract_done(rows, upper, curvature, slice(first, first + start), block_rows)
            width = end - start
            corner = torch.linalg.cholesky(rows[:, :width], upper=True)
            root = corner.diagonal()
            curvature[block_rows] = root.square()
            upper[block_rows, block_rows] = corner / root[:, None]
            if block_rows.stop < len(hessian):
                identity = torch.eye(width, dtype=hessian.dtype, device=hessian.device)
                inverse = torch.linalg.solve_triangular(corner.T, identity, upper=False)
                upper[block_rows, block_rows.stop :] = matmul(inverse / root[:, None], rows[:, width:])
    return Factor(order, upper, curvature)


def _subtract_done(rows: Tensor, upper: Tensor, curvature: Tensor, done: slice, own: slice) -> None:
    """Subtract U[done]ᵀ D U[done], the share of the rows of U that are done, from rows of H, from the diagonal on."""
    scaled = upper[done, own] * curvature[done, None]
    addmm_(rows, scaled.T, upper[done, own.start :], alpha=-1)


def _blocks(columns: int, width: int) -> list[tuple[int, int]]:
    """First and end column of each block."""
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]
