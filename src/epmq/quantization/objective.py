"""From moments to the pair (W*, H) that every solver takes.

For one layer with merged weight A, experts W_k and inputs with Gram matrices G_k, the loss

    Σ_k ω_k/n_k ‖X_k Qᵀ − X_k W_kᵀ‖² + λ̄ ‖Q − A‖²  =  tr((Q − W*) H (Q − W*)ᵀ) + constant

has H = Σ ω_k G_k + λ̄ I and W* = A + (Σ ω_k (W_k − A) G_k) H⁻¹ (E-PMQ, arXiv 2605.16882). GPTQ on the merged model is
the case W_k = A; RegMean (arXiv 2212.09849) is λ̄ = 0 without a grid.

With a share α of the expert's own inputs X̃_k in the target, ((1 − α) X_k + α X̃_k) W_kᵀ, the correction gains
α Σ ω_k W_k D_k, where D_k = (X̃_k − X_k)ᵀ X_k / n_k is the drift.

A layer that is asked for given outputs Y_k in place of X_k W_kᵀ has the correction Σ ω_k (Y_kᵀ X_k / n_k − A G_k).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.matmul import addmm_
from epmq.quantization.factor import Factor, factorize
from epmq.quantization.hessian import Moments


class Objective:
    """The objective of all layers that share one input, collected one task at a time.

    Only one task's Gram matrix exists at any time: it is folded into H and into the layers' corrections at once.

    Attributes:
        hessian: Σ ω_k G_k so far, [in, in] float32, without the anchor.
        correction: Σ ω_k (W_k − A) (G_k + α D_k), or Σ ω_k Y_kᵀ X_k / n_k, so far, [out, in] float32 (stacked layers);
            None while it is zero.
        drift: α Σ ω_k D_k, less Σ ω_k G_k over the tasks with given outputs, so far, [in, in] float32, or None while it
            is zero; A times it is the correction's rest, and is added by `target`.
    """

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor.float()
        self.hessian = torch.zeros(anchor.shape[1], anchor.shape[1], device=anchor.device)
        self.correction: Tensor | None = None
        self.drift: Tensor | None = None
        self._factored: tuple[tuple[float, bool], Factor, float] | None = None

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
        gram = self._fold(moments, weight)
        if expert is None:
            return
        if self.correction is None:
            self.correction = torch.zeros_like(self.anchor)
        if shift is not None:
            self.correction.addr_(shift.float(), moments.mean, alpha=weight)
        drift = moments.cross if features else None
        if drift is not None:
            gram.add_(drift, alpha=features)
            self._drift(drift, weight * features)
        addmm_(self.correction, expert.float() - self.anchor, gram, alpha=weight)

    def add_outputs(self, moments: Moments, weight: float) -> None:
        """Fold in one task that asks the layers for given outputs.

        Args:
            moments: of the layers' input on that task's calibration data; `cross` must be Y_kᵀ X_k / n_k [out, in].
            weight: ω_k.

        Raises:
            ValueError: no token was seen.
        """
        gram, wanted = self._fold(moments, weight), moments.cross
        assert wanted is not None
        if self.correction is None:
            self.correction = torch.zeros_like(self.anchor)
        self.correction.add_(wanted, alpha=weight)
        self._drift(gram, -weight)

    def _fold(self, moments: Moments, weight: float) -> Tensor:
        """Add a task's Gram matrix to H, and return it."""
        gram, self._factored = moments.gram, None
        self.hessian.add_(gram, alpha=weight)
        return gram

    def _drift(self, part: Tensor, weight: float) -> None:
        if self.drift is None:
            self.drift = torch.zeros_like(self.hessian)
        self.drift.add_(part, alpha=weight)

    def damped(self, strength: float) -> Tensor:
        """H = Σ ω_k G_k + strength · (mean of its diagonal) · I, [in, in] float32.

        Raises:
            ValueError: the moments are not finite.
        """
        if not torch.isfinite(self.hessian.diagonal()).all():  # G_ij² ≤ G_ii G_jj
            raise InputError("the layer's inputs hold NaN or Inf")
        hessian = self.hessian.clone()
        hessian.diagonal().add_(strength * self._unit())
        return hessian

    def factor(self, strength: float, act_order: bool = True) -> tuple[Factor, float]:
        """The factor of `damped(strength)`. It is kept: whoever asks for the same again has it at once.

        If H is not positive definite in float32, the strength is raised tenfold until it is.

        Returns:
            the factor, and the strength that was used.

        Raises:
            ValueError: the moments are not finite, or H stays indefinite.
        """
        if self._factored is None or self._factored[0] != (strength, act_order):
            self._factored = None  # two at a time would be the peak of the memory
            for raised in damping_schedule(strength):
                with suppress(torch.linalg.LinAlgError):
                    self._factored = (strength, act_order), factorize(self.damped(raised), act_order), raised
                    break
            else:
                raise InputError(f"the Hessian is not positive definite, even with {raised:g} times its mean diagonal")
        return self._factored[1:]

    def target(self, strength: float, act_order: bool = True) -> tuple[Tensor, float]:
        """The continuous optimum.

        Dead inputs (zero Gram diagonal) keep the anchor's weight: their row of H is λ̄ alone.

        Args:
            strength: λ̄ over the mean of the Gram matrix's diagonal.
            act_order: the order of the factor, see `factor`; it changes no more than rounding does.

        Returns:
            W* [out, in] float32, and the strength that was used.

        Raises:
            ValueError: see `factor`.
        """
        if self.correction is None:
            return self.anchor, strength
        if self.drift is not None:
            addmm_(self.correction, self.anchor, self.drift)
            self.drift = None
        factor, used = self.factor(strength, act_order)
        return factor.solve(self.correction).add_(self.anchor), used

    def anchor_loss(self, target: Tensor, strength: float, damping: float) -> Tensor:
        """tr((A − W*) H (A − W*)ᵀ) under the H that `damped` gives, a row at a time: [out] float32.

        (W* − A) times the H that W* was solved under is the correction, so it takes no product with a Hessian.

        Args:
            target: W* [out, in] float32, as `target` has just given it.
            strength: λ̄ over the mean of the Gram matrix's diagonal, with which it was solved.
            damping: the same for the H that is meant.
        """
        if self.correction is None:
            return torch.zeros_like(self.anchor[:, 0])
        move = target - self.anchor
        share = (damping - strength) * self._unit()
        return (move * self.correction).sum(-1).add_(move.square().sum(-1), alpha=share)

    def _unit(self) -> float:
        """What a strength or a damping is a multiple of."""
        return float(self.hessian.diagonal().mean()) or 1.0


def damping_schedule(strength: float) -> Iterator[float]:
    """A strength, and seven times ten times as much."""
    for _ in range(8):
        yield strength
        strength = max(10 * strength, 1e-6)
