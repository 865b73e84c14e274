"""Second moments of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running Σ x xᵀ, Σ x and, if asked, Σ (x̃ − x) xᵀ over the real tokens of one input group and one task.

    Attributes:
        count: tokens seen.
        total: Σ x, [in] float32.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(columns, device=device)
        self._gram = torch.zeros(columns, columns, device=device)
        self._drift: Tensor | None = None

    def add(self, inputs: Tensor, mask: Tensor | None = None, expert: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            inputs: [..., in], any float dtype.
            mask: which tokens are real, booleans of shape `inputs.shape[:-1]` (or that many entries in all); None
                counts all of them. Padding must never enter a moment.
            expert: x̃, the expert's own inputs to the layer on the same tokens, shaped like `inputs`; None leaves
                the drift out.
        """
        rows = _real_rows(inputs, mask)
        self.count += len(rows)
        self.total += rows.sum(0)
        self._gram.addmm_(rows.T, rows)
        if expert is not None:
            if self._drift is None:
                self._drift = torch.zeros_like(self._gram)
            self._drift.addmm_((_real_rows(expert, mask) - rows).T, rows)

    @property
    def gram(self) -> Tensor:
        """G = Σ x xᵀ / n, [in, in] float32.

        Raises:
            ValueError: no token was seen.
        """
        if self.count == 0:
            raise ValueError("no calibration token reached this layer")
        return self._gram / self.count

    @property
    def drift(self) -> Tensor | None:
        """Σ (x̃ − x) xᵀ / n, [in, in] float32: how the experts' inputs differ; None if they were not given."""
        return None if self._drift is None else self._drift / self.count

    @property
    def mean(self) -> Tensor:
        """Σ x / n, [in] float32."""
        return self.total / max(self.count, 1)


def _real_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    return (rows if mask is None else rows[mask.reshape(-1)]).float()
