"""Merge methods that see a tensor as one vector: pure functions of lengths and angles.

Each takes the base tensor [*shape], K experts' tensors [*shape] and its settings, and returns the merged tensor
[*shape] in the base's dtype. What any of them gives is a linear combination whose coefficients follow from the K × K
inner products: those are taken in float64, piece by piece, and no vector is turned or normalised.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.merging.entrywise import combination, mean_vector, per_expert
from epmq.merging.trim import PIECE

# Two vectors with a larger cosine have one direction, and a line leads from the one to the other.
COLINEAR = 0.9995
# Lengths on the sphere below which a mean has been found.
TOLERANCE = 1e-7
# Sines of angles that are those of one point, or of its opposite.
NO_ANGLE = 1e-6


def model_stock(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """t W̄ + (1 − t) W_0 with t = K cos θ / (1 + (K − 1) cos θ) (Model Stock, Jang et al., arXiv 2403.19522).

    W̄ is the mean of the K ≥ 2 experts, and θ the angle between their task vectors: the point nearest to the centre
    that further experts would show, if all of them were equally far from it. cos θ is the mean over all pairs; a
    negative one counts as 0, for which nothing but the base is left.
    """
    if len(experts) < 2:
        raise InputError(f"merge.method: model_stock merges two experts or more, not {len(experts)}")
    gram, count = _inner_products(experts, base), len(experts)
    # Without length there is no angle: an expert that has not changed has nothing in common with the others.
    cosines = _cosines(gram).nan_to_num(0.0)
    cosine = float(cosines.sum() - cosines.trace()) / (count * (count - 1))
    cosine = min(1.0, max(0.0, cosine))
    return mean_vector(base, experts, scaling=count * cosine / (1 + (count - 1) * cosine))


def slerp(base: Tensor, experts: Sequence[Tensor], *, t: float = 0.5) -> Tensor:
    """sin((1 − t) θ)/sin θ W_1 + sin(t θ)/sin θ W_2, θ the angle between the two (Shoemake, SIGGRAPH 1985).

    Experts of one direction, or of opposite ones, and tensors of zeros are connected by a line: (1 − t) W_1 + t W_2.
    Of the base, only dtype and device matter.

    Args:
        t: where between the two: 0 is the first, 1 the second.
    """
    if len(experts) != 2:
        raise InputError(f"merge.method: slerp merges two experts, not {len(experts)}")
    cosine = float(_cosines(_inner_products(experts))[0, 1])
    if not abs(cosine) <= COLINEAR:  # NaN as well
        return combination(base, experts, [1 - t, t])
    angle = math.acos(cosine)
    return combination(base, experts, [math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)])


def karcher(
    base: Tensor, experts: Sequence[Tensor], *, weights: Sequence[float] | None = None, steps: int = 10
) -> Tensor:
    """The direction in the middle of the experts' on the sphere, with the mean of their lengths.

    It minimises Σ_k w_k θ_k², θ_k the angle to W_k (Karcher, 1977; on spheres: Buss and Fillmore, ACM TOG 20(2), 2001).
    Each step leads from u along Σ_k w_k θ_k/sin θ_k (W_k/‖W_k‖ − cos θ_k u). Of the base, only dtype and device matter.

    Args:
        weights: one an expert, normalised to a sum of 1; None means equal ones.
        steps: at most so many; with 0 the direction is that of the mean of W_k/‖W_k‖.
    """
    share = torch.tensor(per_expert(1.0 if weights is None else weights, experts, "weights"), dtype=torch.float64)
    share /= share.sum()
    gram = _inner_products(experts).cpu()
    lengths = gram.diagonal().sqrt()
    coefficients, there = torch.zeros_like(share), (lengths > 0) & (share > 0)
    if there.any():
        point = _mean_direction(_cosines(gram)[there][:, there], share[there] / share[there].sum(), steps)
        coefficients[there] = point / lengths[there] * (share * lengths).sum()
    return combination(base, experts, coefficients.tolist())


def _mean_direction(cosines: Tensor, share: Tensor, steps: int) -> Tensor:
    """The Karcher mean of K points on the unit sphere, as the coefficients [K] of a combination of them.

    `cosines` [K, K] are their inner products and `share` [K] their weights, which sum to 1; all in float64.
    """

    def length(point: Tensor) -> Tensor:
        return (point @ cosines @ point).clamp(min=0).sqrt()

    if length(share) < TOLERANCE:  # they cancel: any point will do to start from
        point = torch.zeros_like(share)
        point[0] = 1.0
    else:
        point = share / length(share)
    for _ in range(steps):
        near = (cosines @ point).clamp(-1, 1)
        angles = near.acos()
        sines = angles.sin()
        pull = share * (angles / sines).where(sines > NO_ANGLE, 1.0)
        step = pull - pull @ near * point
        size = length(step)
        if size < TOLERANCE:
            break
        point = size.cos() * point + size.sin() / size * step
        point = point / length(point)
    return point


def _inner_products(vectors: Sequence[Tensor], origin: Tensor | None = None) -> Tensor:
    """⟨W_j − W_0, W_k − W_0⟩ of K tensors of one shape, [K, K] float64; `origin` is W_0, or None for 0."""
    tensors = [*vectors, *([] if origin is None else [origin])]
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    for pieces in zip(*(torch.split(tensor.reshape(-1), PIECE) for tensor in tensors)):
        rows = torch.stack([piece.double() for piece in pieces])
        if origin is not None:
            rows = rows[:-1] - rows[-1]
        gram += rows @ rows.T
    return gram


def _cosines(gram: Tensor) -> Tensor:
    """Cosines of the angles between vectors of which the inner products are given; NaN for one without length."""
    lengths = gram.diagonal().sqrt()
    return gram / (lengths[:, None] * lengths)
