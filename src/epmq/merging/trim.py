"""Trims over a tensor or a whole model: the threshold of a task vector that is never whole in memory."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# A base tensor, or some of its rows, and an expert's.
Pair = tuple[Tensor, Tensor]

# Entries that are compared, or merged, at once.
PIECE = 1 << 17
# One in so many entries is drawn to tell where a threshold lies; odd, so that it goes through all columns of a matrix.
STRIDE = 257
# Where the threshold is looked for first: so many standard deviations of the draw around its place.
SLACK = 5.0


def task_vector(base: Tensor, expert: Tensor) -> Tensor:
    """τ = W_k − W_0, float32 (Ilharco et al., arXiv 2212.04089)."""
    return expert.to(torch.float32, copy=True).sub_(base)


def magnitude_threshold(pairs: Callable[[], Iterable[Pair]], density: float) -> float:
    """The magnitude of the ⌊density · n⌋-th largest of the n entries of a task vector that is never whole in memory.

    A draw of the entries tells between which two magnitudes it must lie; one pass over all of them then counts what is
    larger and keeps what lies between. Should it lie elsewhere after all, the pass is repeated with a wider bracket, so
    the result is exact.

    Args:
        pairs: gives the base's and the expert's tensors piece by piece, the same ones each time it is called.
        density: share of entries that are at or above the threshold, 0 to 1 (equal ones are all kept); at 0 it is
            infinite. Where NaN are so many that no threshold has as many entries above it, it is NaN.
    """
    count, drawn = 0, []
    for base, expert in pairs():
        count += base.numel()
        drawn.append(task_vector(base.reshape(-1)[::STRIDE], expert.reshape(-1)[::STRIDE]).abs_())
    keep = int(density * count)
    if keep <= 0:
        return math.inf
    sample = torch.cat(drawn).sort(descending=True).values
    rank, slack = keep / count * len(sample), SLACK
    while True:
        spread = slack * (1 + math.sqrt(rank * (1 - keep / count)))
        first, last = int(rank - spread), math.ceil(rank + spread)
        high = float(sample[first]) if first >= 0 else math.inf
        low = float(sample[last]) if last < len(sample) else 0.0
        threshold = _rank_between(pairs, keep, low, high)
        if threshold is not None:
            return threshold
        if low == 0 and high == math.inf:
            return math.nan
        slack *= 8


def _rank_between(pairs: Callable[[], Iterable[Pair]], keep: int, low: float, high: float) -> float | None:
    """The `keep`-th largest magnitude if it lies between two, these included; else None."""
    above = at_high = at_low = 0
    # In one growing piece of memory: many small ones, kept between large ones that come and go, would hold those apart.
    inside = bytearray()
    for whole in pairs():
        for base, expert in zip(*(torch.split(tensor.reshape(-1), PIECE) for tensor in whole)):
            sizes = task_vector(base, expert).abs_()
            larger = sizes > high
            above += int(larger.count_nonzero())
            between = sizes[(sizes >= low) ^ larger]
            # Equal magnitudes, of which 16-bit numbers have many, are counted and not kept.
            at_high += int((between == high).count_nonzero())
            at_low += int((between == low).count_nonzero()) if low < high else 0
            inside += between[(between > low) & (between < high)].cpu().numpy().data.cast("B")
    for rank, value in ((above, None), (at_high, high)):
        if keep <= rank:
            return value
        keep -= rank
    count = len(inside) // 4
    if keep <= count:
        return float(torch.frombuffer(inside, dtype=torch.float32).kthvalue(count - keep + 1).values)
    return low if keep <= count + at_low else None
