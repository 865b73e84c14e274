"""Merge methods: pure functions on tensors.

Each takes the base tensor, one tensor an expert (all of one shape) and its settings, computes in float32 and
returns the merged tensor in float32. To add a method, write such a function and give it a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scaling = float | Sequence[float]


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Task vectors τ_k = W_k − W_0, stacked: [experts, *shape] float32 (Ilharco et al., arXiv 2212.04089)."""
    return torch.stack([expert.float() for expert in experts]) - base.float()


def average(base: Tensor, experts: Sequence[Tensor], *, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of the experts (Wortsman et al., arXiv 2203.05482); the base is not used.

    Args:
        base: [*shape]; only its device matters.
        experts: K tensors [*shape].
        weights: K weights, normalised to a sum of 1; None means equal ones.
    """
    share = _per_expert(1.0 if weights is None else weights, experts, "weights").to(base.device)
    return torch.tensordot(share / share.sum(), torch.stack([expert.float() for expert in experts]), dims=1)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], *, scaling: Scaling = 0.3) -> Tensor:
    """W_0 + Σ_k s_k τ_k (Ilharco et al., arXiv 2212.04089).

    Args:
        base: [*shape].
        experts: K tensors [*shape].
        scaling: one s for all experts or one an expert.
    """
    share = _per_expert(scaling, experts, "scaling").to(base.device)
    return base.float() + torch.tensordot(share, task_vectors(base, experts), dims=1)


def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: float = 1.0,
    density: float = 0.2,
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """TIES-Merging: trim each task vector, elect a sign, average what agrees (Yadav et al., arXiv 2306.01708).

    Args:
        base: [*shape].
        experts: K tensors [*shape].
        scaling: factor on the merged task vector.
        density: share of entries that survive the trim, by magnitude, 0 to 1.
        thresholds: K magnitudes; entries below them are trimmed. A whole-model trim passes them in; None trims
            each tensor by itself to `density`.
    """
    tau = task_vectors(base, experts)
    if thresholds is None:
        thresholds = [magnitude_threshold(vector, density) for vector in tau]
    for vector, threshold in zip(tau, thresholds, strict=True):
        vector[vector.abs() < threshold] = 0
    return base.float() + scaling * disjoint_mean(tau)


def dare(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: Scaling = 0.3,
    density: float = 0.5,
    seed: int = 0,
    name: str = "",
    combine: str = "task_arithmetic",
) -> Tensor:
    """DARE: drop entries of the task vectors at random and rescale the rest by 1/density (arXiv 2311.03099).

    Args:
        base: [*shape].
        experts: K tensors [*shape].
        scaling: as in `task_arithmetic`; one number only with `ties`.
        density: probability that an entry is kept.
        seed: of the draw; with `name` (the tensor's) it fixes the mask whatever the order of tensors or the device.
        combine: `task_arithmetic` sums what is left, `ties` elects signs and averages what agrees.
    """
    tau = task_vectors(base, experts)
    for k, vector in enumerate(tau):
        vector.mul_(_bernoulli(vector.shape, density, f"{seed}/{name}/{k}").to(vector.device)).div_(density)
    if combine == "ties":
        if not isinstance(scaling, (int, float)):
            raise ValueError("merge.scaling: dare with combine: ties takes one scaling, not one an expert")
        return base.float() + scaling * disjoint_mean(tau)
    if combine != "task_arithmetic":
        raise ValueError(f"merge.combine: {combine!r} is not 'task_arithmetic' or 'ties'")
    share = _per_expert(scaling, experts, "scaling").to(base.device)
    return base.float() + torch.tensordot(share, tau, dims=1)


def disjoint_mean(tau: Tensor) -> Tensor:
    """Mean, an entry at a time, of the task vectors whose sign is the elected one.

    The elected sign is the sign of the sum; where the sum is 0 it is positive, so that no entry is lost.

    Args:
        tau: trimmed task vectors, [experts, *shape] float32.

    Returns:
        [*shape] float32.
    """
    positive = tau.sum(0) >= 0
    agrees = torch.where(positive, tau > 0, tau < 0)
    return (tau * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def magnitude_threshold(values: Tensor, density: float) -> float:
    """The magnitude of the ⌊density · n⌋-th largest of n entries; infinite if that keeps none."""
    keep = int(density * values.numel())
    if keep <= 0:
        return float("inf")
    return float(values.abs().flatten().kthvalue(values.numel() - keep + 1).values)


class ThresholdSearch:
    """The exact k-th largest magnitude of a vector that is never whole in memory.

    Non-negative float32 numbers sort as their bit patterns do, so two histograms are enough: one over the upper
    15 value bits to find the bucket, then one over the lower 16 bits inside it. Feed every piece with `add`, call
    `narrow` once, feed every piece again, then read `threshold`.
    """

    def __init__(self, density: float) -> None:
        self.density = density
        self.count = 0
        self.bucket: int | None = None
        self._above = 0
        self._histogram = torch.zeros(1 << 16, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count the magnitudes of one piece (any shape)."""
        bits = values.float().abs().flatten().contiguous().view(torch.int32)
        if self.bucket is None:
            self.count += bits.numel()
            found = bits >> 16
        else:
            found = bits[(bits >> 16) == self.bucket] & 0xFFFF
        self._histogram += torch.bincount(found, minlength=1 << 16).cpu()

    def narrow(self) -> None:
        """End of the first pass."""
        self.bucket, self._above = self._find(max(1, int(self.density * self.count)))
        self._histogram.zero_()

    def threshold(self) -> float:
        """End of the second pass: magnitudes at or above it are the `density` largest (ties are all kept)."""
        keep = int(self.density * self.count)
        if keep <= 0 or self.bucket is None:
            return float("inf")
        low, _ = self._find(keep - self._above)
        return float(torch.tensor([(self.bucket << 16) | low], dtype=torch.int32).view(torch.float32))

    def _find(self, rank: int) -> tuple[int, int]:
        """The bucket that holds the `rank`-th largest entry, and how many entries lie above that bucket."""
        from_top = self._histogram.flip(0).cumsum(0)
        position = int(torch.searchsorted(from_top, rank))
        return (1 << 16) - 1 - position, int(from_top[position - 1]) if position else 0


def _per_expert(value: Scaling, experts: Sequence[Tensor], field: str) -> Tensor:
    values = [float(value)] * len(experts) if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != len(experts):
        raise ValueError(f"merge.{field}: {len(values)} values for {len(experts)} experts")
    return torch.tensor(values)


def _bernoulli(shape: torch.Size, density: float, key: str) -> Tensor:
    import zlib

    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return (torch.rand(shape, generator=generator) < density).float()


METHODS: dict[str, Callable[..., Tensor]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
}
