"""From moments to the pair (W*, H) that every solver takes.

For one layer with merged weight A, experts W_k and inputs with Gram matrices G_k, the loss

    Σ_k ω_k/n_k ‖X_k Qᵀ − X_k W_kᵀ‖² + λ̄ ‖Q − A‖²  =  tr((Q − W*) H (Q − W*)ᵀ) + constant

has H = Σ ω_k G_k + λ̄ I and W* = A + (Σ ω_k (W_k − A) G_k) H⁻¹ (E-PMQ, arXiv 2605.16882). GPTQ on the merged model is
the case W_k = A; RegMean (arXiv 2212.09849) is λ̄ = 0 without a grid.

With a share α of the expert's own inputs X̃_k in the target, ((1 − α) X_k + α X̃_k) W_kᵀ, the correction gains
α Σ ω_k W_k D_k, where D_k = (X̃_k − X_k)ᵀ X_k / n_k is the drift.

A task that gives target outputs Y_k in place of X_k W_kᵀ has the correction Σ ω_k (Y_kᵀ X_k / n_k − A G_k).
"""

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
        anchor: A [out, in] float32 (stacked layers).
        hessian: Σ ω_k G_k so far, [in, in] float32, without the anchor.
        correction: Σ ω_k (W_k − A) (G_k + α D_k), plus Σ ω_k Y_kᵀ X_k / n_k over the tasks with target outputs, so
            far, [out, in] float32; None while it is zero.
        anchor_gram: α Σ ω_k D_k, less Σ ω_k G_k over the tasks with target outputs, so far, [in, in] float32; None
            while it is zero. `target` adds A times it to the correction, in one product for all tasks.
    """

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor.float()
        self.hessian = torch.zeros(anchor.shape[1], anchor.shape[1], device=anchor.device)
        self.correction: Tensor | None = None
        self.anchor_gram: Tensor | None = None
        self._factored: tuple[tuple[float, bool], Factor, float] | None = None

    def add_task(
        self,
        moments: Moments,
        weight: float,
        expert: Tensor | None = None,
        bias_delta: Tensor | None = None,
        alpha: float = 0.0,
    ) -> None:
        """Fold in one task.

        Args:
            moments: of the layers' input on that task's calibration data.
            weight: ω_k.
            expert: W_k [out, in] (stacked like the anchor); None for the merged target W_k = A.
            bias_delta: b_k − b [out], the expert's bias less the one the layer keeps; None where layers have no bias.
            alpha: α, the share of the expert's own inputs in the target; `moments.input_drift` is the drift D_k.

        Raises:
            ValueError: no token was seen.
        """
        gram = self._add_gram(moments, weight)
        if expert is None:
            return
        if self.correction is None:
            self.correction = torch.zeros_like(self.anchor)
        if bias_delta is not None:
            self.correction.addr_(bias_delta.float(), moments.mean, alpha=weight)
        drift = moments.input_drift if alpha else None
        if drift is not None:
            gram.add_(drift, alpha=alpha)
            self.anchor_gram = _add_scaled(self.anchor_gram, drift, weight * alpha)
        addmm_(self.correction, expert.float() - self.anchor, gram, alpha=weight)

    def add_target_task(self, moments: Moments, weight: float) -> None:
        """Fold in one task with target outputs; `moments.target_cross` is Y_kᵀ X_k / n_k [out, in]. See `add_task`."""
        gram, cross = self._add_gram(moments, weight), moments.target_cross
        assert cross is not None
        self.correction = _add_scaled(self.correction, cross, weight)
        self.anchor_gram = _add_scaled(self.anchor_gram, gram, -weight)

    def _add_gram(self, moments: Moments, weight: float) -> Tensor:
        """Add a task's Gram matrix to H, and return it."""
        gram, self._factored = moments.gram, None
        self.hessian.add_(gram, alpha=weight)
        return gram

    def damped(self, ridge: float) -> Tensor:
        """H = Σ ω_k G_k + ridge · (mean of its diagonal) · I, [in, in] float32.

        Raises:
            ValueError: the moments are not finite.
        """
        if not torch.isfinite(self.hessian.diagonal()).all():  # G_ij² ≤ G_ii G_jj
            raise InputError("the layer's inputs hold NaN or Inf")
        hessian = self.hessian.clone()
        hessian.diagonal().add_(ridge * self._mean_diagonal())
        return hessian

    def factor(self, ridge: float, act_order: bool = True) -> tuple[Factor, float]:
        """The factor of `damped(ridge)`. It is kept: whoever asks for the same again has it at once.

        If H is not positive definite in float32, the ridge is raised tenfold until it is.

        Returns:
            the factor, and the ridge that was used.

        Raises:
            ValueError: the moments are not finite, or H stays indefinite.
        """
        if self._factored is None or self._factored[0] != (ridge, act_order):
            self._factored = None  # two at a time would be the peak of the memory
            for raised in damping_schedule(ridge):
                with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                    self._factored = (ridge, act_order), factorize(self.damped(raised), act_order), raised
                    break
            else:
                raise InputError(f"the Hessian is not positive definite, even with {raised:g} times its mean diagonal")
        return self._factored[1:]

    def take_factor(self, other: "Objective") -> None:
        """Take the factor that another objective with the same H has found."""
        self._factored = other._factored

    def target(self, ridge: float, act_order: bool = True) -> tuple[Tensor, float]:
        """The continuous optimum.

        Dead inputs (zero Gram diagonal) keep the anchor's weight: their row of H is λ̄ alone.

        Args:
            ridge: λ̄ over the mean of the Gram matrix's diagonal.
            act_order: the order of the factor; it changes no more than rounding does.

        Returns:
            W* [out, in] float32, and the ridge that was used; errors as in `factor`.
        """
        if self.correction is None:
            return self.anchor, ridge
        if self.anchor_gram is not None:
            addmm_(self.correction, self.anchor, self.anchor_gram)
            self.anchor_gram = None
        factor, used = self.factor(ridge, act_order)
        return factor.solve(self.correction).add_(self.anchor), used

    def anchor_loss(self, target: Tensor, ridge: float, damping: float) -> Tensor:
        """tr((A − W*) H (A − W*)ᵀ) under the H that `damped(damping)` gives, a row at a time: [out] float32.

        (W* − A) times the H that W* was solved under is the correction, so it takes no product with a Hessian.

        Args:
            target: W* [out, in] float32, as `target` has just given it for `ridge`.
        """
        if self.correction is None:
            return torch.zeros_like(self.anchor[:, 0])
        delta = target - self.anchor
        share = (damping - ridge) * self._mean_diagonal()
        return (delta * self.correction).sum(-1).add_(delta.square().sum(-1), alpha=share)

    def _mean_diagonal(self) -> float:
        """What a ridge or a damping is a multiple of."""
        return float(self.hessian.diagonal().mean()) or 1.0


def damping_schedule(ridge: float) -> Iterator[float]:
    """A ridge, and seven times ten times as much."""
    for _ in range(8):
        yield ridge
        ridge = max(10 * ridge, 1e-6)


def _add_scaled(total: Tensor | None, term: Tensor, weight: float) -> Tensor:
    """total + weight · term, in place if there is a total."""
    return (torch.zeros_like(term) if total is None else total).add_(term, alpha=weight)
