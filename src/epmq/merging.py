"""Merge methods: pure functions on tensors.

Each takes the base tensor, one tensor an expert (all of one shape) and its settings, computes in float32 and
returns the merged tensor in float32. To add a method, write such a function and give it a line in `METHODS`.

All work piece by piece: K task vectors of a whole embedding matrix in float32 would be the peak of a run's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scaling = float | Sequence[float]

# Entries that are merged at once.
PIECE = 1 << 20


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
    share /= share.sum()

    def mean(_: Tensor, experts: Sequence[Tensor]) -> Tensor:
        return torch.tensordot(share, torch.stack([expert.float() for expert in experts]), dims=1)

    return _by_pieces(mean, base, experts)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], *, scaling: Scaling = 0.3) -> Tensor:
    """W_0 + Σ_k s_k τ_k (Ilharco et al., arXiv 2212.04089).

    Args:
        base: [*shape].
        experts: K tensors [*shape].
        scaling: one s for all experts or one an expert.
    """
    share = _per_expert(scaling, experts, "scaling").to(base.device)

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        return base.float() + torch.tensordot(share, task_vectors(base, experts), dims=1)

    return _by_pieces(add, base, experts)


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
    if thresholds is None:
        thresholds = [magnitude_threshold(expert.float() - base.float(), density) for expert in experts]

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = task_vectors(base, experts)
        for vector, threshold in zip(tau, thresholds, strict=True):
            vector[vector.abs() < threshold] = 0
        return base.float() + scaling * disjoint_mean(tau)

    return _by_pieces(add, base, experts)


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
    if combine not in ("task_arithmetic", "ties"):
        raise ValueError(f"merge.combine: {combine!r} is not 'task_arithmetic' or 'ties'")
    if combine == "ties" and not isinstance(scaling, (int, float)):
        raise ValueError("merge.scaling: dare with combine: ties takes one scaling, not one an expert")
    share = _per_expert(scaling, experts, "scaling").to(base.device)
    masks = [_bernoulli(base.shape, density, f"{seed}/{name}/{k}").to(base.device) for k in range(len(experts))]

    def add(base: Tensor, parts: Sequence[Tensor]) -> Tensor:
        tau = task_vectors(base, parts[: len(experts)])
        for vector, mask in zip(tau, parts[len(experts) :]):
            vector.mul_(mask).div_(density)
        change = share[0] * disjoint_mean(tau) if combine == "ties" else torch.tensordot(share, tau, dims=1)
        return base.float() + change

    return _by_pieces(add, base, [*experts, *masks])


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
    search = ThresholdSearch(density)
    search.add(values)
    search.narrow()
    search.add(values)
    return search.threshold()


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
        for piece in values.reshape(-1).split(PIECE):
            bits = piece.float().abs().view(torch.int32)
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


def _by_pieces(merge: Callable[[Tensor, Sequence[Tensor]], Tensor], base: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The merge of one entry depends on nothing but that entry of base and parts: take a slice of each at a time."""
    merged = torch.empty(base.shape, device=base.device)
    slices = [tensor.reshape(-1).split(PIECE) for tensor in (merged, base, *parts)]
    for out, first, *rest in zip(*slices):
        out.copy_(merge(first, rest))
    return merged


def _per_expert(value: Scaling, experts: Sequence[Tensor], field: str) -> Tensor:
    values = [float(value)] * len(experts) if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != len(experts):
        raise ValueError(f"merge.{field}: {len(values)} values for {len(experts)} experts")
    return torch.tensor(values)


def _bernoulli(shape: torch.Size, density: float, key: str) -> Tensor:
    import zlib

    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.rand(shape, generator=generator) < density


METHODS: dict[str, Callable[..., Tensor]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
}
