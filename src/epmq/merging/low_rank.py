"""Methods that see matrices, on task vectors that are LoRA adapters: in the span of the factors, never at full size."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epmq.matmul import one_thread

# s·B [out, r] and A [r, in] of τ = s·B·A.
Factors = tuple[Tensor, Tensor]


def merge_factors(method: Callable[..., Tensor], factors: Sequence[Factors], **settings: Any) -> Tensor:
    """The merged task vector [out, in] float32 of K low-rank ones.

    With P and Q orthonormal bases of what the experts write and read, τ_k = P c_k Qᵀ. A method f that turns with the
    bases gives P f(c) Qᵀ, and c_k is as small as the ranks together. What a method counts among singular values are
    those inside this span.

    Args:
        method: of `epmq.merging.matrices`.
        factors: of each expert.
        settings: of the method.
    """
    outputs, left = _basis([up for up, _ in factors])
    inputs, right = _basis([down.T for _, down in factors])
    cores = [up @ down.T for up, down in zip(left, right)]
    if "width" in inspect.signature(method).parameters:
        settings["width"] = len(inputs)
    return outputs @ method(cores, **settings) @ inputs.T


def _basis(parts: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An orthonormal basis [n, d] of the columns of K matrices [n, r_k], and their coordinates in it, K × [d, r_k]."""
    with one_thread():
        basis, coordinates = torch.linalg.qr(torch.cat(list(parts), 1))
    return basis, coordinates.split([part.shape[1] for part in parts], 1)
