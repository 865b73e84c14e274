"""From moments to the pair (W*, H) that every solver takes.

For one layer with merged weight A, experts W_k and inputs with Gram matrices G_k, the loss

    Σ_k ω_k/n_k ‖X_k Qᵀ − X_k W_kᵀ‖² + λ̄ ‖Q − A‖²  =  tr((Q − W*) H (Q − W*)ᵀ) + constant

has H = Σ ω_k G_k + λ̄ I and W* = A + (Σ ω_k (W_k − A) G_k) H⁻¹ (E-PMQ, arXiv 2605.16882). GPTQ on the merged model is
the case W_k = A; RegMean (arXiv 2212.09849) is λ̄ = 0 without a grid.

With a share α of the expert's own inputs X̃_k in the target, ((1 − α) X_k + α X̃_k) W_kᵀ, the correction gains
α Σ ω_k W_k D_k, where D_k = (X̃_k − X_k)ᵀ X_k / n_k is the drift.

A layer that is asked to move its present output X_k Wᵀ by a given Δ_k has the target X_k Wᵀ + Δ_k, and the correction
Σ ω_k ((W − A) G_k + Δ_kᵀ X_k / n_k).

Where each task brings a metric S_k [out, out] in which its errors count (`epmq.sensitivity`), the loss becomes
Σ_k ω_k tr(S_k (Q − W_k*) H_k (Q − W_k*)ᵀ) with H_k = G_k + λ̄ I, and W* = A + D solves Σ_k ω_k S_k D H_k = Σ_k S_k C_k
for the corrections C_k of the tasks. Two steps of conjugate gradients, preconditioned by (Σ ω_k S_k) ⊗ H, come close
enough: more change no score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq.moments import Moments

# Share of the identity in every metric: nothing that a layer writes is quite free.
FLOOR = 0.02
# Of conjugate gradients.
STEPS = 2


@dataclass(frozen=True)
class Metric:
    """How a task's errors count in what a layer writes: S = (1 − FLOOR) (Rᵀ R + r I) + FLOOR I, of mean diagonal 1.

    Attributes:
        rows: R [rank, out] float32, the directions that count most.
        rest: r, what any other direction counts.
    """

    rows: Tensor
    rest: float = 0.0

    def times(self, matrix: Tensor) -> Tensor:
        """S M, for M [out, anything]."""
        leading = self.rows.T @ (self.rows @ matrix)
        return leading.mul_(1 - FLOOR).add_(matrix, alpha=(1 - FLOOR) * self.rest + FLOOR)


@dataclass(frozen=True)
class Share:
    """What one task with a metric of its own asks of a layer.

    Attributes:
        weight: ω_k.
        metric: S_k.
        gram: ω_k G_k [in, in].
        correction: ω_k C_k [out, in].
    """

    weight: float
    metric: Metric
    gram: Tensor
    correction: Tensor


class Objective:
    """The objective of all layers that share one input, collected one task at a time.

    Only one task's Gram matrix exists at any time, unless tasks have metrics: it is folded into H and into the layers'
    corrections at once.

    Attributes:
        hessian: Σ ω_k G_k so far, [in, in] float32, without the anchor.
        correction: Σ ω_k (W_k − A) G_k so far, [out, in] float32 (stacked layers), or None while it is zero.
        shares: of the tasks that have a metric.
    """

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor.float()
        self.hessian = torch.zeros(anchor.shape[1], anchor.shape[1], device=anchor.device)
        self.correction: Tensor | None = None
        self.shares: list[Share] = []

    def add(
        self,
        moments: Moments,
        weight: float,
        expert: Tensor | None = None,
        shift: Tensor | None = None,
        features: float = 0.0,
    ) -> None:
        """Fold in one task.

        Args:
            moments: of the layers' input on that task's calibration data.
            weight: ω_k.
            expert: W_k [out, in] (stacked like the anchor); None for the merged target W_k = A.
            shift: b_k − b [out], the expert's bias less the one the layer keeps; None where layers have no bias.
            features: α, the share of the expert's own inputs in the target; `moments.cross` must be the drift D_k.

        Raises:
            ValueError: no token was seen.
        """
        gram = moments.gram
        self.hessian.add_(gram, alpha=weight)
        if expert is None:
            return
        if self.correction is None:
            self.correction = torch.zeros_like(self.anchor)
        self.correction.addmm_(expert.float() - self.anchor, gram, alpha=weight)
        if shift is not None:
            self.correction.addr_(shift.float(), moments.mean, alpha=weight)
        del gram  # a copy, and the drift is as large
        drift = moments.cross if features else None
        if drift is not None:
            self.correction.addmm_(expert.float(), drift, alpha=weight * features)

    def add_move(self, moments: Moments, weight: float, current: Tensor, metric: Metric | None = None) -> None:
        """Fold in one task that asks the layers to move their output.

        Args:
            moments: of the layers' input on that task's calibration data; `cross` must be Δ_kᵀ X_k / n_k [out, in].
            weight: ω_k.
            current: W [out, in], the weights that the output to move was computed with.
            metric: how the task's errors count (`epmq.sensitivity`); None if all directions do alike.

        Raises:
            ValueError: no token was seen.
        """
        gram, move = moments.gram.mul_(weight), moments.cross
        assert move is not None
        move.mul_(weight)
        if current is not self.anchor:
            move.addmm_(current.float() - self.anchor, gram)
        self.hessian.add_(gram)
        self.correction = move.clone() if self.correction is None else self.correction.add_(move)
        if metric is not None:
            self.shares.append(Share(weight, metric, gram, move))

    def solve(self, strength: float) -> tuple[Tensor, Tensor, float]:
        """The continuous optimum and the Hessian.

        Dead inputs (zero Gram diagonal) keep the anchor's weight: their row of H is λ̄ alone. If H is not positive
        definite in float32, λ̄ is raised tenfold until it is.

        Args:
            strength: λ̄ over the mean of the Gram matrix's diagonal.

        Returns:
            W* [out, in] float32, H [in, in] float32 with the anchor in it, and the strength that was used.

        Raises:
            ValueError: the moments are not finite, or H stays indefinite after seven raises.
        """
        if not torch.isfinite(self.hessian).all():
            raise ValueError("the layer's inputs hold NaN or Inf")
        mean = float(self.hessian.diagonal().mean()) or 1.0
        for _ in range(8):
            hessian = self.hessian.clone()
            hessian.diagonal().add_(strength * mean)
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                break
            strength = max(10 * strength, 1e-6)
        else:
            raise ValueError(f"the Hessian is not positive definite, even with an anchor strength of {strength:g}")
        if self.correction is None:
            return self.anchor, hessian, strength
        if self.shares:
            return self.anchor + self._measured(strength * mean, factor), hessian, strength
        return self.anchor + torch.cholesky_solve(self.correction.T, factor).T, hessian, strength

    def _measured(self, anchor: float, factor: Tensor) -> Tensor:
        """D of Σ ω_k S_k D H_k = Σ S_k C_k; tasks without a metric count all directions alike.

        Args:
            anchor: λ̄.
            factor: Cholesky factor of H.
        """
        assert self.correction is not None
        plain = 1 - sum(share.weight for share in self.shares)
        rest = self.hessian - sum(share.gram for share in self.shares)
        metric = plain * torch.eye(len(self.anchor), device=self.anchor.device)
        wanted = self.correction - sum(share.correction for share in self.shares)
        for share in self.shares:
            metric += share.weight * share.metric.times(torch.eye(len(metric), device=metric.device))
            wanted += share.metric.times(share.correction)
        outer = torch.linalg.cholesky(metric)

        def apply(matrix: Tensor) -> Tensor:
            found = matrix @ rest + anchor * plain * matrix
            for share in self.shares:
                found += share.metric.times(matrix @ share.gram + anchor * share.weight * matrix)
            return found

        def precondition(matrix: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(matrix, outer).T, factor).T

        return conjugate_gradients(apply, precondition, wanted, STEPS)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], wanted: Tensor, steps: int
) -> Tensor:
    """D with apply(D) ≈ wanted, for a linear map that is symmetric and positive definite (Hestenes & Stiefel 1952).

    Args:
        apply, precondition: the map, and something near its inverse.
        wanted: the right-hand side, of any shape.
        steps: at most so many; fewer if nothing is left.
    """
    found, left = torch.zeros_like(wanted), wanted
    direction, before = torch.zeros_like(wanted), wanted.new_tensor(torch.inf)
    for _ in range(steps):
        ready = precondition(left)
        size = (left * ready).sum()
        if size <= 0:
            break
        direction = ready + size / before * direction
        moved = apply(direction)
        length = size / (direction * moved).sum()
        found, left, before = found + length * direction, left - length * moved, size
    return found
