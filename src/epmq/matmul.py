"""Matrix products in float32, by whichever of PyTorch's libraries is fast on the processor.

PyTorch multiplies float32 with Intel's MKL, which leaves AVX-512 alone on processors of other makers; oneDNN, the other
library that comes with it, uses it there, and takes less than half the time. Both compute in float32, in another order.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread: LAPACK rounds otherwise with another number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def uses_onednn() -> bool:
    """Whether oneDNN takes the products of this processor: it has AVX-512, and is not Intel's.

    EPMQ_ONEDNN=0 in the environment leaves them to PyTorch.
    """
    if os.environ.get("EPMQ_ONEDNN") == "0":
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    suitable = bool(capabilities.get("avx512_f") and capabilities.get("sse4a"))  # SSE4a is AMD's alone
    available = torch.backends.mkldnn.is_available()
    return suitable and available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] · right [k, n], of one float dtype, without gradients."""
    return _onednn(left, right.T) if _suits(left, right) else left @ right


def addmm_(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Add alpha · left [m, k] · right [k, n] to total [m, n] in its place, all of one float dtype, without gradients.

    Returns:
        `total`.
    """
    if not _suits(left, right):
        return total.addmm_(left, right, alpha=alpha)
    return total.add_(_onednn(left, right.T), alpha=alpha)


def fast_transpose(rows: Tensor) -> Tensor:
    """rowsᵀ [m, n] for rows [n, m], laid out so that its rows, and the transpose of some, are quick in a product."""
    return rows.T.contiguous() if _suits(rows) else rows.T


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `torch.nn.functional.linear` gives, and that itself where gradients are asked for.

    Inputs [..., in], weight [out, in], bias [out] and what is returned [..., out] are of one float dtype.
    """
    operands = (inputs, weight) if bias is None else (inputs, weight, bias)
    if torch.is_grad_enabled() or not _suits(*operands):
        return functional.linear(inputs, weight, bias)
    return _onednn(inputs, weight, bias)


def _suits(*operands: Tensor) -> bool:
    """Whether oneDNN can take a product of these, and should; it refuses empty ones."""
    return uses_onednn() and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() for tensor in operands
    )


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left · rightᵀ + bias."""
    if not (right.is_contiguous() or right.T.is_contiguous()):  # for which oneDNN has nothing but a loop of scalars
        right = right.T.contiguous().T if right.stride(0) == 1 else right.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
