"""Ridge regression of a linear map, towards the map there is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from epmq.matmul import one_thread

# Ridges that are tried, over the mean of the features' Gram diagonal.
RIDGES = tuple(10 ** (power / 2) for power in range(-6, 5))


@dataclass(frozen=True)
class RidgeFit:
    """A linear map, fitted.

    Attributes:
        before: mean squared error of the scores by the map as it was.
        after: mean squared error of the scores that are left out one by one, by the map as it is fitted to the others.
    """

    weight: Tensor  # [classes, features] float32
    bias: Tensor | None  # [classes] float32, or None where the map has none
    ridge: float  # over the mean Gram diagonal; infinite where the map stays as it was
    before: float
    after: float


def fit_ridge(features: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> RidgeFit:
    """Fit a linear map from features to scores, near the one there is, in float64.

    The ridge is the one of `RIDGES` with the least error on examples that are left out one by one, which has a closed
    form: r_i / (1 − h_i) with the residual r_i and the leverage h_i (Allen 1974, PRESS). If none is better than the
    map there is, that stays.

    Args:
        features: [examples, features], any float dtype.
        scores: [examples, classes], what the map is to give.
        weight: [classes, features] of the map there is, in the dtype of the features.
        bias: [classes] of the map there is, or None.
    """
    rows, missing = features.double(), scores.double() - functional.linear(features, weight, bias).double()
    if bias is not None:  # a constant feature of the usual size
        size = rows.square().mean().sqrt()
        rows = torch.cat([rows, size.expand(len(rows), 1)], dim=1)
    with one_thread():
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    rotated = rows @ vectors
    cross = missing.T @ rotated / len(rows)

    def left_out(ridge: float) -> tuple[float, Tensor]:
        """The error on left out examples, and by how much the map changes, in the basis of the eigenvectors."""
        inverse = 1 / (values.clamp(min=0) + ridge * values.mean())
        leverage = (rotated.square() * inverse).sum(1) / len(rows)
        delta = cross * inverse
        residual = (missing - rotated @ delta.T) / (1 - leverage).clamp(min=1e-6)[:, None]
        return float(residual.square().mean()), delta

    (after, rotated_delta), ridge = min(((left_out(ridge), ridge) for ridge in RIDGES), key=lambda item: item[0][0])
    before = float(missing.square().mean())
    if not after < before:
        return RidgeFit(weight.float(), None if bias is None else bias.float(), float("inf"), before, before)
    delta = (rotated_delta @ vectors.T).float()
    if bias is not None:
        bias = bias.float() + float(size) * delta[:, -1]
    return RidgeFit(weight.float() + delta[:, : weight.shape[1]], bias, ridge, before, after)
