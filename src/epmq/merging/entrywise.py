"""Merge methods that look at single entries: pure functions on tensors.

Each takes the base tensor [*shape], K experts' tensors [*shape] and its settings, computes in float32 and returns the
merged tensor [*shape] in the base's dtype.

All work piece by piece, small enough for a processor's cache: merging is bound by memory, and K task vectors of a whole
embedding matrix in float32 would be the peak of a run's memory.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from epmq.errors import InputError
from epmq.merging.trim import PIECE, magnitude_threshold

Scaling = float | Sequence[float]


def average(base: Tensor, experts: Sequence[Tensor], *, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of the experts (Wortsman et al., arXiv 2203.05482); of the base, only dtype and device matter.

    The K `weights` are normalised to a sum of 1; None means equal ones.
    """
    share = _per_expert(1.0 if weights is None else weights, experts, "weights")
    total = sum(share)

    def mean(_: Tensor, experts: Sequence[Tensor]) -> Tensor:
        merged = experts[0].mul_(share[0] / total)
        for expert, weight in zip(experts[1:], share[1:]):
            merged.add_(expert, alpha=weight / total)
        return merged

    return _by_pieces(mean, base, experts)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], *, scaling: Scaling = 0.3) -> Tensor:
    """W_0 + Σ_k s_k τ_k (Ilharco et al., arXiv 2212.04089); `scaling` is one s for all experts or one an expert."""
    share = _per_expert(scaling, experts, "scaling")

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = [expert.sub_(base) for expert in experts]
        return _add(base, tau, share)

    return _by_pieces(add, base, experts)


def mean_vector(base: Tensor, experts: Sequence[Tensor], *, scaling: float = 1.0) -> Tensor:
    """W_0 + s/K Σ_k τ_k: what methods that see matrices make of all other tensors."""
    return task_arithmetic(base, experts, scaling=scaling / len(experts))


def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: float = 1.0,
    density: float = 0.2,
    agreed: str = "mean",
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """TIES-Merging: trim each task vector, elect a sign, average what agrees (Yadav et al., arXiv 2306.01708).

    Args:
        scaling: factor on the merged task vector.
        density: share of entries that survive the trim, by magnitude, 0 to 1.
        agreed: `mean` of the entries that have the elected sign, or their `sum`, as in AdaMerging's and FusionBench's
            tables (with a `scaling` of 0.3).
        thresholds: K magnitudes; entries below them are trimmed. A whole-model trim passes them in; None trims
            each tensor by itself to `density`.
    """
    if thresholds is None:
        thresholds = [magnitude_threshold(lambda e=expert: [(base, e)], density) for expert in experts]  # type: ignore[misc]
    # hardshrink keeps what is larger than its argument: the next number below the threshold.
    cuts = torch.tensor(thresholds, dtype=torch.float32).nextafter(torch.tensor(0.0)).tolist()

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = [hardshrink(expert.sub_(base), cut) for expert, cut in zip(experts, cuts, strict=True)]
        return disjoint_mean(tau, agreed).mul_(scaling).add_(base)

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
        scaling: as in `task_arithmetic`; one number only with `ties`.
        density: probability that an entry is kept.
        seed: of the draw; with `name` (the tensor's) it fixes the mask whatever the order of tensors or the device.
        combine: `task_arithmetic` sums what is left, `ties` elects signs and averages what agrees.
    """
    if combine not in ("task_arithmetic", "ties"):
        raise InputError(f"merge.combine: {combine!r} is not 'task_arithmetic' or 'ties'")
    if combine == "ties" and not isinstance(scaling, (int, float)):
        raise InputError("merge.scaling: dare with combine: ties takes one scaling, not one an expert")
    share = _per_expert(scaling, experts, "scaling")
    masks = [_bernoulli(base.shape, density, f"{seed}/{name}/{k}").to(base.device) for k in range(len(experts))]

    def add(base: Tensor, parts: Sequence[Tensor]) -> Tensor:
        drawn = zip(parts[: len(experts)], parts[len(experts) :])
        tau = [expert.sub_(base).mul_(mask).div_(density) for expert, mask in drawn]
        if combine == "ties":
            return disjoint_mean(tau).mul_(share[0]).add_(base)
        return _add(base, tau, share)

    return _by_pieces(add, base, [*experts, *masks])


def disjoint_mean(tau: Sequence[Tensor], agreed: str = "mean") -> Tensor:
    """Mean or sum, an entry at a time, of the task vectors whose sign is the elected one, [*shape] float32.

    The elected sign is the sign of the sum; where the sum is 0 it is positive, so that no entry is lost. `tau` are
    trimmed task vectors, K tensors [*shape] float32; `agreed` is `mean` or `sum`.
    """
    total = tau[0].clone()
    for vector in tau[1:]:
        total.add_(vector)
    elected = total.ge_(0).mul_(2).sub_(1)  # 1 or -1
    same, votes = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector in tau:
        share = (vector * elected).clamp_(min=0)
        same.add_(share)
        votes.add_(share.gt_(0))
    same.mul_(elected)
    return same if agreed == "sum" else same.div_(votes.clamp_(min=1))


def _by_pieces(merge: Callable[[Tensor, Sequence[Tensor]], Tensor], base: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The merge of one entry depends on nothing but that entry of base and parts: take a slice of each at a time.

    What is merged are copies in float32, in the same memory each time, which `merge` may overwrite.
    """
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    work = torch.empty(1 + len(parts), min(PIECE, base.numel()), dtype=torch.float32, device=base.device)
    for out, *pieces in zip(*(torch.split(tensor.reshape(-1), PIECE) for tensor in (merged, base, *parts))):
        first, *rest = (copy[: len(piece)].copy_(piece) for copy, piece in zip(work, pieces))
        out.copy_(merge(first, rest))
    return merged


def _add(base: Tensor, tau: Sequence[Tensor], share: Sequence[float]) -> Tensor:
    """Add weighted task vectors to the base, in its place."""
    for vector, weight in zip(tau, share):
        base.add_(vector, alpha=weight)
    return base


def _per_expert(value: Scaling, experts: Sequence[Tensor], field: str) -> list[float]:
    values = [float(value)] * len(experts) if isinstance(value, (int, float)) else list(map(float, value))
    if len(values) != len(experts):
        raise InputError(f"merge.{field}: {len(values)} values for {len(experts)} experts")
    return values


def _bernoulli(shape: torch.Size, density: float, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.rand(shape, generator=generator) < density
