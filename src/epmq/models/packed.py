"""Layers that keep their weight in codes, in about as many bytes as on disk.

Few rows of inputs are multiplied by a kernel for codes where there is one (`epmq.models.kernels`); otherwise the weight
is made for the call, and what is computed is what the plain layer computes, bit for bit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from epmq.models.blocks import LINEAR
from epmq.models.codes import pack_bytes, signed, unpack_bytes, unsigned
from epmq.models.kernels import FEW_ROWS, fitting, row_chunks
from epmq.quantization.grid import Grid, QuantizedTensor


class Bytes(nn.Module):
    """Codes packed row by row, low bits first: uint8 [rows, ⌈columns·bits/8⌉], to whole groups of three for 3 bits."""

    packed: Tensor

    def __init__(self, codes: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.columns = bits, codes.shape[1]
        parts = [pack_bytes(unsigned(codes[rows], bits), bits) for rows in row_chunks((len(codes), self.columns))]
        self.register_buffer("packed", torch.cat(parts))

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Codes [rows, columns] int8 of some rows."""
        return signed(unpack_bytes(self.packed[rows], self.bits)[:, : self.columns].contiguous(), self.bits)


class PackedWeight(nn.Module):
    """A weight [out, in] that is kept in codes; layers that share it share this module.

    What is kept is its own, on the device of `weight`, and no parameter. Moved to another device, it is packed anew for
    it; cast (`model.half()`), it is computed with in that dtype, and codes, scales and zero points stay as they are.

    Args:
        weight: the codes.
        dtype: what is computed in.
        kernels: whether kernels may multiply few rows, inexactly.
        table: rows are looked up.

    Attributes:
        shape: [out, in].
        grid: on which the codes lie.
        scale: [out, groups] as stored.
        dtype: what is computed in.
        held: the codes: `Bytes`, or the form of a kernel.
    """

    scale: Tensor

    def __init__(
        self, weight: QuantizedTensor, dtype: torch.dtype = torch.float32, kernels: bool = True, table: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self._kernels, self._table = dtype, kernels, table
        self.grid: Grid = weight.grid
        self.shape = (weight.codes.shape[0], weight.codes.shape[1])
        self._read_in = weight.dtype
        self._hold(weight)

    def _hold(self, weight: QuantizedTensor) -> None:
        # Tensors of a file are maps of it, which must not stay.
        weight = replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone())
        kernel = fitting(weight, self._table) if self._kernels else None
        self.held: Any = kernel or Bytes(weight.codes, self.grid.bits)
        self.register_buffer("scale", weight.scale)
        self.zeros = None if self.grid.symmetric else Bytes(weight.zero_point, self.grid.bits)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel multiplies few rows by it."""
        return not isinstance(self.held, Bytes)

    def rows(self, rows: slice | Tensor) -> QuantizedTensor:
        """Some rows of the codes, scales and zero points; of a kernel's own form, slices of `row_chunks`."""
        scale = self.scale[rows]
        zero = torch.zeros_like(scale, dtype=torch.int8) if self.zeros is None else self.zeros.codes(rows)
        return QuantizedTensor(self.held.codes(rows), scale, zero, self.grid, self._read_in)

    def quantized(self) -> QuantizedTensor:
        """The codes [out, in] int8, scales and zero points [out, groups], as they are in the checkpoint."""
        return self.rows(slice(None))

    def dequantize(self) -> Tensor:
        """The weight [out, in], in the dtype that is computed in."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.scale.device)
        for rows in row_chunks(self.shape):  # which stay in the cache of a processor
            weight[rows] = self.rows(rows).dequantize()
        return weight

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows [..., in] of ids of any shape."""
        if not ids.numel():
            return torch.empty(*ids.shape, self.shape[1], dtype=self.dtype, device=ids.device)
        rows = self.rows(ids.flatten()).dequantize().to(self.dtype)
        return rows.reshape(*ids.shape, self.shape[1])

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """inputs [..., in] · weightᵀ + bias: [..., out]."""
        if not self.suits(inputs):
            return functional.linear(inputs, self.dequantize(), bias)
        return self.by_kernel(inputs, bias)

    def suits(self, inputs: Tensor) -> bool:
        """Whether a kernel multiplies these: there is one, they are few, and nobody asks for gradients."""
        few = 0 < inputs.numel() <= FEW_ROWS * self.shape[1]
        return few and self.has_kernel and not (torch.is_grad_enabled() and inputs.requires_grad)

    def by_kernel(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """As `linear`, by the kernel."""
        product: Tensor = self.held.multiply(inputs.reshape(-1, self.shape[1]))
        product = product if bias is None else product + bias
        return product.reshape(*inputs.shape[:-1], self.shape[0])

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeight":
        like = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        self.dtype = like.dtype
        if like.device != self.scale.device:
            self._hold(self.quantized().to(like.device))
        return self


class LazyWeight(Tensor):
    """A weight in codes as the tensor that it stands for, made whenever something computes with it.

    Some models ask a layer for the dtype, shape or device of its weight, which costs nothing so.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, packed: PackedWeight, transposed: bool = False) -> "LazyWeight":
        shape = packed.shape[::-1] if transposed else packed.shape
        made: LazyWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=packed.dtype, device=packed.scale.device)
        made._make = (lambda: packed.dequantize().T.contiguous()) if transposed else packed.dequantize
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = tree_map_only(cls, lambda weight: weight._make(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class InCodes:
    """What layers and tables have in common whose weight is kept in codes; `pack` makes them.

    Attributes:
        packed: the weight; `weight` is a tensor that is made when something computes with it.
    """

    packed: PackedWeight

    @property
    def weight(self) -> Tensor:
        """[out, in], or [rows, features]."""
        return LazyWeight(self.packed)

    def quantized(self) -> QuantizedTensor:
        """The weight's codes [out, in], scales and zero points [out, groups]."""
        return self.packed.quantized()


class PackedLinear(InCodes, nn.Linear):  # type: ignore[override]
    """A linear layer whose weight is kept in codes."""

    def forward(self, input: Tensor) -> Tensor:
        """As of `nn.Linear`."""
        return self.packed.linear(input, self.bias)


class PackedEmbedding(InCodes, nn.Embedding):  # type: ignore[override]
    """A table whose rows are kept in codes, and made when they are looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """As of `nn.Embedding`."""
        return self.packed.lookup(input)


class PackedConv1D(InCodes, Conv1D):
    """A linear layer that stores its weight as [in, out], such as GPT-2's, whose weight is kept in codes [out, in]."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[in, out]."""
        return LazyWeight(self.packed, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """As of `Conv1D`."""
        if self.packed.suits(x):
            return self.packed.by_kernel(x, self.bias)
        made: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return made


# What becomes what.
KINDS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, PackedLinear),
    (Conv1D, PackedConv1D),
    (nn.Embedding, PackedEmbedding),
)


def can_be_packed(module: nn.Module) -> bool:
    """Whether `pack` can turn a module into one that keeps its weight in codes."""
    return isinstance(module, LINEAR) or (isinstance(module, nn.Embedding) and module.max_norm is None)


def pack(module: nn.Module, weight: PackedWeight) -> None:
    """Let a linear layer or a table keep its weight in codes; all else about it stays.

    One of a subclass, such as Gemma's tables that scale what they give, becomes one of a subclass of its own class and
    `PackedLinear` or `PackedEmbedding`: where its code calls that of `nn.Linear` or `nn.Embedding`, it calls theirs,
    and where it takes the weight itself, it gets one that is made for the call.
    """
    own = type(module)
    plain, packed = next(pair for pair in KINDS if isinstance(module, pair[0]))
    del module._parameters["weight"]
    module.__class__ = packed if own is plain else type(f"Packed{own.__name__}", (own, packed), {})
    module.packed = weight
