"""Second moments of a layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.matmul import addmm_, transposed

# Rows of the Gram matrix that are added up at once, at least; what lies below them is left to symmetry.
ROWS = 128


class Moments:
    """Running Σ x xᵀ, Σ x and, if asked, Σ t xᵀ over the real tokens of one input group and one task.

    Attributes:
        count: tokens seen.
        total: Σ x, [in] float32.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(columns, device=device)
        self._gram = torch.zeros(columns, columns, device=device)
        self._cross: Tensor | None = None

    def add(self, inputs: Tensor, mask: Tensor | None = None, beside: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            inputs: [..., in], any float dtype.
            mask: which tokens are real, booleans of shape `inputs.shape[:-1]` (or that many entries in all); None
                counts all of them. Padding must never enter a moment.
            beside: t, [..., anything], something else about the same tokens, such as how the expert's inputs differ;
                None leaves Σ t xᵀ out.
        """
        rows = _real_rows(inputs, mask)
        self.count += len(rows)
        self.total += rows.sum(0)
        columns = transposed(rows)
        for start, end in self._parts():
            addmm_(self._gram[start:end, start:], columns[start:end], columns[start:].T)
        if beside is not None:
            others = _real_rows(beside, mask)
            if self._cross is None:
                self._cross = torch.zeros(others.shape[1], rows.shape[1], device=rows.device)
            addmm_(self._cross, others.T, rows)

    def _parts(self) -> Iterator[tuple[int, int]]:
        """First and end row of each part of the Gram matrix; a part holds nothing left of its own columns."""
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
        for start, end in self._parts():
            gram[end:, start:end] = gram[start:end, end:].T
        return gram

    @property
    def cross(self) -> Tensor | None:
        """Σ t xᵀ / n, [of t, in] float32; None if no t was given."""
        return None if self._cross is None else self._cross / self.count

    @property
    def mean(self) -> Tensor:
        """Σ x / n, [in] float32."""
        return self.total / max(self.count, 1)


def _real_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    return (rows if mask is None else rows[mask.reshape(-1)]).float()
