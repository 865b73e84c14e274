"""Merge methods that see the weight of a linear layer as a matrix: pure functions on its K task vectors.

Each takes task vectors τ_k = W_k − W_0, K tensors [out, in] float32, and gives one of them. Factors on the result are
the caller's. All of them turn with the bases of inputs and outputs: for orthogonal P and Q, f(P τ Qᵀ) = P f(τ) Qᵀ.
That is what `epmq.merging.low_rank` rests on.

Singular vectors come from the Gram matrix of the smaller side in float64: several times as fast as an SVD of a large
matrix, and exact to about 1e-8 of the largest singular value; what lies below counts as 0.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.matmul import addmm_, matmul, one_thread
from epmq.merging.entrywise import total_of
from epmq.quantization.factor import Factor, factorize
from epmq.quantization.objective import damping_schedule

# Singular values below this share of the largest are rounding errors of the Gram matrix in float64.
NOTHING = 1e-7
# Steps, and their size, of WUDI as it was published.
STEPS, STEP_SIZE = 300, 1e-5


def wudi(vectors: Sequence[Tensor], *, ridge: float = 0.1, iterative: bool = False, width: int | None = None) -> Tensor:
    """The τ that interferes least with what each expert's layer reads (WUDI, Cheng et al., arXiv 2503.08099).

    Minimises Σ_k ‖(τ − τ_k) τ_kᵀ‖² / ‖τ_k‖_F², where the rows of τ_k stand for the inputs of the layer. That is
    RegMean (arXiv 2212.09849) with G_k = τ_kᵀτ_k / ‖τ_k‖_F² in the place of the Gram matrix of inputs, so it
    has a closed form: with H = Σ G_k and a ridge towards the sum, where nothing interferes,
    τ = (Σ τ_k G_k + λ̄ Σ τ_k) (H + λ̄ I)⁻¹, and λ̄ is `ridge` times the mean of H's diagonal.

    Args:
        vectors: K task vectors [out, in] float32.
        ridge: pull towards the sum of the task vectors, over the mean of H's diagonal.
        iterative: as published instead: 300 steps of Adam from the sum of the task vectors.
        width: of the layer's inputs, if `vectors` are given in a smaller basis.

    Raises:
        InputError: H is not positive definite, whatever the ridge.
    """
    total = total_of(vectors)
    with one_thread():  # a long sum depends on the number of threads, too
        sizes = [float(vector.square().sum()) or 1.0 for vector in vectors]
    if iterative:
        return _descend(total, vectors, sizes)
    # As a correction of the sum: τ = Σ τ_k − (Σ_k (Σ_j τ_j − τ_k) G_k) (H + λ̄ I)⁻¹.
    hessian, interference = total.new_zeros(total.shape[1], total.shape[1]), torch.zeros_like(total)
    for vector, size in zip(vectors, sizes):
        gram = matmul(vector.T, vector).div_(size)
        hessian.add_(gram)
        addmm_(interference, total - vector, gram)
    level = float(hessian.trace()) / (width or len(hessian))
    if level == 0:  # no expert has changed this layer
        return total
    return total - _factor(hessian, level, ridge).solve(interference)


def _factor(hessian: Tensor, level: float, ridge: float) -> Factor:
    """The factor of H + ridge · level · I, with a larger ridge where that is not positive definite in its dtype."""
    diagonal = hessian.diagonal().clone()
    for raised in damping_schedule(ridge):
        hessian.diagonal().copy_(diagonal + raised * level)
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            return factorize(hessian, act_order=False)
    raise InputError(f"WUDI's Hessian is not positive definite, even with {raised:g} times its mean diagonal")


def _descend(total: Tensor, vectors: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    """WUDI's loss, descended from the sum of the task vectors by Adam; `sizes` are ‖τ_k‖_F²."""
    with torch.enable_grad():
        merged = total.clone().requires_grad_()
        optimizer = torch.optim.Adam([merged], lr=STEP_SIZE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            pairs = zip(vectors, sizes)
            loss = torch.stack([((merged - vector) @ vector.T).square().sum() / size for vector, size in pairs]).sum()
            loss.backward()
            optimizer.step()
    return merged.detach()


def tsv_m(vectors: Sequence[Tensor]) -> Tensor:
    """Each task's leading singular vectors, side by side and made orthogonal (TSV-Merge, arXiv 2412.00081).

    Of each of the K task vectors the first 1/K of the singular triples is kept; U and V of all together are replaced
    by the orthogonal matrices nearest to them (Procrustes).
    """
    rank = min(vectors[0].shape) // len(vectors)
    if rank == 0:
        return total_of(vectors) / len(vectors)
    parts = [singular_triples(vector, rank) for vector in vectors]
    left, values, right = (torch.cat([part[i] for part in parts], -1) for i in range(3))
    return nearest_orthogonal(left) * values @ nearest_orthogonal(right).T


def iso_c(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of the task vectors with all singular values at their mean (Iso-C, arXiv 2502.04959)."""
    total = total_of(vectors)
    left, values, right = singular_triples(total)
    return values.mean() * left @ right.T


def iso_cts(vectors: Sequence[Tensor], *, common: float = 0.8) -> Tensor:
    """As `iso_c`, with a share of the space for directions of single tasks (Iso-CTS, arXiv 2502.04959).

    The first `common` of the singular triples of the sum are kept; the others make room for the first triples of each
    task vector's part outside of them, the same number a task. U and V of all are made orthogonal, and all singular
    values are set to their mean.
    """
    total, count = total_of(vectors), len(vectors)
    size = min(total.shape)
    own = round((size - int(size * common)) / count)
    left, values, right = (part[..., : size - own * count] for part in singular_triples(total))
    parts = [(left, values, right)]
    if own:
        parts += [singular_triples(vector - left @ (left.T @ vector), own) for vector in vectors]
    left, values, right = (torch.cat([part[i] for part in parts], -1) for i in range(3))
    return values.mean() * nearest_orthogonal(left) @ nearest_orthogonal(right).T


def singular_triples(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values [r] of a matrix [m, n] and their vectors [m, r] and [n, r], in its dtype.

    At most `count` of them; those that are 0 are left out.
    """
    wide = matrix.shape[1] > matrix.shape[0]
    tall = (matrix.T if wide else matrix).double()
    with one_thread():
        squares, vectors = torch.linalg.eigh(tall.T @ tall)
    values = squares.clamp(min=0).sqrt().flip(0)[:count]
    values = values[values > NOTHING * values[:1]]
    vectors = vectors.flip(1)[:, : len(values)]
    other = tall @ vectors / values
    left, right = (vectors, other) if wide else (other, vectors)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix [m, n] with orthonormal columns (rows, where n > m) nearest to one: U Vᵀ of its SVD."""
    left, _, right = singular_triples(matrix)
    return left @ right.T
