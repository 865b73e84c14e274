"""Second moments of a layer's inputs, and the loss under a Hessian that is made of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.matmul import addmm_, fast_transpose, matmul

# Rows of the Gram matrix that are added up at once, at least; what lies below them is left to symmetry.
ROWS = 128


def hessian_loss(delta: Tensor, hessian: Tensor) -> Tensor:
    """tr(Δ H Δᵀ), a row at a time: [out] float32 for Δ [out, in] and H [in, in]."""
    delta = delta.float()
    return matmul(delta, hessian).mul_(delta).sum(-1)


class Moments:
    """Running moments over the real tokens of one input group and one task.

    With x what the layers receive, these are Σ x xᵀ, Σ x and, if asked, Σ (x̃ − x) xᵀ, where x̃ is what the expert's
    own layers receive, and Σ y xᵀ, where y is what the layers are to give. `count` is n, the tokens seen.

    Args:
        columns: of x.
        off_diagonal: factor on what lies off the diagonal of the Gram matrix (RegMean, arXiv 2212.09849).
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", off_diagonal: float = 1.0) -> None:
        self.count, self._off_diagonal = 0, off_diagonal
        self._total = torch.zeros(columns, device=device)
        self._gram = torch.zeros(columns, columns, device=device)
        self._input_drift: Tensor | None = None
        self._target_cross: Tensor | None = None

    def add(
        self, inputs: Tensor, mask: Tensor | None = None, drift: Tensor | None = None, targets: Tensor | None = None
    ) -> None:
        """Add a batch of inputs.

        Args:
            inputs: x [..., in], any float dtype.
            mask: which tokens are real, booleans of shape `inputs.shape[:-1]` (or that many entries in all); None
                counts all of them. Padding must never enter a moment.
            drift: x̃ − x [..., in] of the same tokens; None leaves `input_drift` as it is.
            targets: y [..., out] of the same tokens; None leaves `target_cross` as it is.
        """
        rows = _real_rows(inputs, mask)
        self.count += len(rows)
        self._total += rows.sum(0)
        columns = fast_transpose(rows)
        for start, end in self._row_blocks():
            addmm_(self._gram[start:end, start:], columns[start:end], columns[start:].T)
        if drift is not None:
            self._input_drift = _add_cross(self._input_drift, _real_rows(drift, mask), rows)
        if targets is not None:
            self._target_cross = _add_cross(self._target_cross, _real_rows(targets, mask), rows)

    def _row_blocks(self) -> Iterator[tuple[int, int]]:
        """First and end row of each block of the Gram matrix; a block holds nothing left of its own columns."""
        step = max(ROWS, len(self._gram) // 16)
        return ((start, start + step) for start in range(0, len(self._gram), step))

    @property
    def gram(self) -> Tensor:
        """G = Σ x xᵀ / n, [in, in] float32.

        Raises:
            ValueError: no token was seen.
        """
        if self.count == 0:
            raise InputError("no calibration token reached this layer")
        gram = self._gram / self.count
        for start, end in self._row_blocks():
            gram[end:, start:end] = gram[start:end, end:].T
        if self._off_diagonal != 1:
            diagonal = gram.diagonal().clone()
            gram.mul_(self._off_diagonal).diagonal().copy_(diagonal)
        return gram

    @property
    def input_drift(self) -> Tensor | None:
        """D = Σ (x̃ − x) xᵀ / n, [in, in] float32; None if no drift was given."""
        return None if self._input_drift is None else self._input_drift / self.count

    @property
    def target_cross(self) -> Tensor | None:
        """Σ y xᵀ / n, [out, in] float32; None if no targets were given."""
        return None if self._target_cross is None else self._target_cross / self.count

    @property
    def mean(self) -> Tensor:
        """Σ x / n, [in] float32."""
        return self._total / max(self.count, 1)


def _real_rows(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The real tokens, one a row, in float32."""
    rows = tokens.detach().reshape(-1, tokens.shape[-1])
    return (rows if mask is None else rows[mask.reshape(-1)]).float()


def _add_cross(total: Tensor | None, left: Tensor, rows: Tensor) -> Tensor:
    """total + leftᵀ rows, in place if there is a total."""
    total = rows.new_zeros(left.shape[1], rows.shape[1]) if total is None else total
    return addmm_(total, left.T, rows)
