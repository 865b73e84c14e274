"""Merge methods that look at single entries: pure functions on tensors.

Each takes the base tensor [*shape], K experts' tensors [*shape] and its settings, computes in float32 and returns the
merged tensor [*shape] in the base's dtype.

All work piece by piece, small enough for a processor's cache: merging is bound by memory, and K task vectors of a whole
embedding matrix in float32 would be the peak of a run's memory.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from epmq.errors import InputError
from epmq.merging.trim import PIECE, magnitude_threshold

Scaling = float | Sequence[float]
# What follows the drop of entries: the sum, or the mean or the sum of what has the elected sign.
COMBINE = ("task_arithmetic", "ties", "ties_sum")


def average(base: Tensor, experts: Sequence[Tensor], *, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of the experts (Wortsman et al., arXiv 2203.05482); of the base, only dtype and device matter.

    The K `weights` are normalised to a sum of 1; None means equal ones.
    """
    share = per_expert(1.0 if weights is None else weights, experts, "weights")
    return combination(base, experts, [weight / sum(share) for weight in share])


def combination(base: Tensor, experts: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ_k c_k W_k with K coefficients of any sum; of the base, only dtype and device matter."""

    def add(_: Tensor, experts: Sequence[Tensor]) -> Tensor:
        merged = experts[0].mul_(coefficients[0])
        for expert, coefficient in zip(experts[1:], coefficients[1:]):
            merged.add_(expert, alpha=coefficient)
        return merged

    return _by_pieces(add, base, experts)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], *, scaling: Scaling = 0.3) -> Tensor:
    """W_0 + Σ_k s_k τ_k (Ilharco et al., arXiv 2212.04089); `scaling` is one s for all experts or one an expert."""
    share = per_expert(scaling, experts, "scaling")

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = [expert.sub_(base) for expert in experts]
        return _add(base, tau, share)

    return _by_pieces(add, base, experts)


def mean_vector(base: Tensor, experts: Sequence[Tensor], *, scaling: float = 1.0) -> Tensor:
    """W_0 + s/K Σ_k τ_k: what methods that see matrices make of all other tensors."""
    return task_arithmetic(base, experts, scaling=scaling / len(experts))


def consensus(
    base: Tensor, experts: Sequence[Tensor], *, scaling: float = 0.3, threshold: float = 0.4, agreement: int = 2
) -> Tensor:
    """Consensus Task Arithmetic: W_0 + s m ∘ τ_MTL (Wang et al., arXiv 2405.07813, TALL masks and Consensus Merging).

    τ_MTL = Σ_k τ_k. Task k uses the entries of its TALL mask, m_k = 1{|τ_k| ≥ λ |τ_MTL − τ_k|}; m keeps those that
    enough tasks use. What a single task uses, and what none does, harms the others.

    Args:
        scaling: s, factor on the merged task vector.
        threshold: λ of the masks; a larger one lets less pass.
        agreement: how many tasks must use an entry that is kept, 1 to K.
    """
    if agreement > len(experts):
        raise InputError(f"merge.agreement: {agreement} tasks of {len(experts)}")

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = [expert.sub_(base) for expert in experts]
        total = total_of(tau)
        votes = torch.zeros_like(total)
        for vector in tau:
            votes.add_(vector.abs() >= (total - vector).abs_().mul_(threshold))
        # A product and no choice: what is not finite stays so, and is found.
        return base.add_(total.mul_(votes.ge_(agreement)), alpha=scaling)

    return _by_pieces(add, base, experts)


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
        combine: `task_arithmetic` sums what is left; `ties` elects signs and averages what agrees, `ties_sum` adds that
            up.
    """
    merge = _combine("dare", combine, scaling, experts)
    masks = [_bernoulli(base.shape, density, f"{seed}/{name}/{k}").to(base.device) for k in range(len(experts))]

    def add(base: Tensor, parts: Sequence[Tensor]) -> Tensor:
        drawn = zip(parts[: len(experts)], parts[len(experts) :])
        return merge(base, [expert.sub_(base).mul_(mask).div_(density) for expert, mask in drawn])

    return _by_pieces(add, base, [*experts, *masks])


def breadcrumbs(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: Scaling = 0.3,
    smallest: float = 0.85,
    largest: float = 0.007,
    combine: str = "task_arithmetic",
) -> Tensor:
    """Model Breadcrumbs: W_0 + s Σ_k m_k ∘ τ_k (Davari and Belilovsky, arXiv 2312.06795).

    m_k drops the smallest entries of τ_k, which are noise, and the largest, which are outliers, tensor by tensor. Equal
    magnitudes share one fate: those that are as large as the last that is kept are kept.

    Args:
        scaling: as in `task_arithmetic`; one number only where signs are elected.
        smallest: share of the entries that is dropped for being small; the paper's β.
        largest: share that is dropped for being large; the paper's 1 − γ.
        combine: as in `dare`.
    """
    if smallest + largest >= 1:
        raise InputError(f"merge.smallest, merge.largest: {smallest} and {largest} leave nothing")
    merge = _combine("breadcrumbs", combine, scaling, experts)
    bounds = [_middle(base, expert, smallest, largest) for expert in experts]

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = [expert.sub_(base) for expert in experts]
        for vector, (low, high) in zip(tau, bounds):
            sizes = vector.abs()
            vector.mul_((sizes >= low) & (sizes <= high))
        return merge(base, tau)

    return _by_pieces(add, base, experts)


def _middle(base: Tensor, expert: Tensor, smallest: float, largest: float) -> tuple[float, float]:
    """The smallest and the largest magnitude that are left of a task vector without so much of either end."""
    count = base.numel()
    below, above = int(smallest * count), int(largest * count)

    def ranked(rank: int) -> float:
        return magnitude_threshold(lambda: [(base, expert)], (rank + 0.5) / max(count, 1))

    return ranked(count - below) if below else 0.0, ranked(above + 1) if above else math.inf


def della(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: Scaling = 1.0,
    density: float = 0.5,
    window: float = 0.3,
    seed: int = 0,
    name: str = "",
    combine: str = "ties",
) -> Tensor:
    """DELLA: drop small entries more often than large ones, elect signs, fuse (Deep et al., arXiv 2406.11617).

    By MAGPRUNE an entry of rank r of n in its row, from the smallest magnitude on, stays with the chance
    p_r = density − window/2 + window (r − 1)/(n − 1), and is divided by it. What is no matrix is one row.

    Args:
        scaling: factor on the merged task vector; with `task_arithmetic` also one an expert.
        density: mean chance to stay.
        window: between the chances of the smallest and the largest entry of a row; the paper's ε.
        seed, name: as in `dare`.
        combine: as in `dare`.
    """
    low, high = density - window / 2, density + window / 2
    if low <= 0 or high > 1:
        raise InputError(f"merge.window: chances of {low:g} to {high:g} are not in 0 to 1")
    merge = _combine("della", combine, scaling, experts)
    row = max(1, base.shape[1:].numel() if base.dim() > 1 else base.numel())
    ladder = torch.linspace(low, high, row) if row > 1 else torch.tensor([density])
    ladder, draws = ladder.to(base.device), [_generator(f"{seed}/{name}/{k}") for k in range(len(experts))]

    def add(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        tau = []
        for expert, generator in zip(experts, draws):
            rows = expert.sub_(base).view(-1, row)
            order = rows.abs().argsort(dim=1, stable=True)
            chances = torch.empty_like(rows).scatter_(1, order, ladder.expand_as(rows))
            drawn = torch.rand(rows.shape, generator=generator).to(rows.device)
            tau.append(rows.mul_(drawn < chances).div_(chances).view(-1))
        return merge(base, tau)

    return _by_pieces(add, base, experts, row)


def _combine(
    method: str, combine: str, scaling: Scaling, experts: Sequence[Tensor]
) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """What makes the merged tensor of the base and of task vectors that have lost entries; one of `COMBINE`."""
    if combine not in COMBINE:
        raise InputError(f"merge.combine: {combine!r} is not {', '.join(COMBINE[:-1])} or {COMBINE[-1]}")
    if combine != "task_arithmetic" and not isinstance(scaling, (int, float)):
        raise InputError(f"merge.scaling: {method} with combine: {combine} takes one scaling, not one an expert")
    share = per_expert(scaling, experts, "scaling")

    def merge(base: Tensor, tau: Sequence[Tensor]) -> Tensor:
        if combine == "task_arithmetic":
            return _add(base, tau, share)
        return disjoint_mean(tau, "sum" if combine == "ties_sum" else "mean").mul_(share[0]).add_(base)

    return merge


def disjoint_mean(tau: Sequence[Tensor], agreed: str = "mean") -> Tensor:
    """Mean or sum, an entry at a time, of the task vectors whose sign is the elected one, [*shape] float32.

    The elected sign is the sign of the sum; where the sum is 0 it is positive, so that no entry is lost. `tau` are
    trimmed task vectors, K tensors [*shape] float32; `agreed` is `mean` or `sum`.
    """
    elected = total_of(tau).ge_(0).mul_(2).sub_(1)  # 1 or -1
    same, votes = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector in tau:
        share = (vector * elected).clamp_(min=0)
        same.add_(share)
        votes.add_(share.gt_(0))
    same.mul_(elected)
    return same if agreed == "sum" else same.div_(votes.clamp_(min=1))


def _by_pieces(
    merge: Callable[[Tensor, Sequence[Tensor]], Tensor], base: Tensor, parts: Sequence[Tensor], row: int = 1
) -> Tensor:
    """The merge of one entry depends on nothing but that entry of base and parts: take a slice of each at a time.

    What is merged are copies in float32, in the same memory each time, which `merge` may overwrite. Where it depends on
    the entry's row, no slice parts one: each has a multiple of `row` entries.
    """
    merged, size = torch.empty(base.shape, dtype=base.dtype, device=base.device), max(1, PIECE // row) * row
    work = torch.empty(1 + len(parts), min(size, base.numel()), dtype=torch.float32, device=base.device)
    for out, *pieces in zip(*(torch.split(tensor.reshape(-1), size) for tensor in (merged, base, *parts))):
        first, *rest = (copy[: len(piece)].copy_(piece) for copy, piece in zip(work, pieces))
        out.copy_(merge(first, rest))
    return merged


def total_of(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of K tensors of one shape, in new memory."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total.add_(vector)
    return total


def _add(base: Tensor, tau: Sequence[Tensor], share: Sequence[float]) -> Tensor:
    """Add weighted task vectors to the base, in its place."""
    for vector, weight in zip(tau, share):
        base.add_(vector, alpha=weight)
    return base


def per_expert(value: Scaling, experts: Sequence[Tensor], field: str) -> list[float]:
    """A setting as one number an expert; `field` is its name in an error."""
    values = [float(value)] * len(experts) if isinstance(value, (int, float)) else list(map(float, value))
    if len(values) != len(experts):
        raise InputError(f"merge.{field}: {len(values)} values for {len(experts)} experts")
    return values


def _bernoulli(shape: torch.Size, density: float, key: str) -> Tensor:
    return torch.rand(shape, generator=_generator(key)) < density


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))
