"""Layers and tables as onnxruntime's operators on codes: `MatMulNBits` and `GatherBlockQuantized`.

The operators are those of `com.microsoft` (docs/ContribOperators.md of onnxruntime): codes unsigned, low bits first, in
blocks of columns that share a scale and a zero point.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.models.codes import pack_bytes, unsigned
from epmq.models.meta import rename, tied_names
from epmq.quantization.grid import Grid, QuantizedTensor

DOMAIN = "com.microsoft"
# accuracy_level of MatMulNBits: 0 multiplies in the inputs' own dtype, 4 rounds them to 8 bits.
EXACT, INTEGER = 0, 4
# Sizes of blocks. At 4 and 8 bits onnxruntime 1.32 takes 512 and 1024 as well; 1.30 does not, the newest in browsers.
BLOCKS = (16, 32, 64, 128, 256)


def stored_bits(grid: Grid) -> int:
    """Bits in which codes are stored: there are no operators on 3 bits."""
    return 4 if grid.bits == 3 else grid.bits


def block_of(grid: Grid, columns: int) -> int:
    """Columns of a block: a group or a part of it; where a row has one scale, those that take the fewest bytes."""
    if grid.group_size != -1:
        return min(grid.group_size, BLOCKS[-1])
    bits = stored_bits(grid)

    def row_bytes(block: int) -> int:
        blocks = -(-columns // block)
        return blocks * (block * bits // 8 + 4)

    return min(BLOCKS, key=row_bytes)


def blocks_of(weight: QuantizedTensor) -> dict[str, Any]:
    """A weight [out, in] in the operators' form.

    Returns:
        `codes` [out, blocks · block · bits/8] uint8, `scales` [out, blocks] float32, `zero_points`
        [out, ⌈blocks·bits/8⌉] uint8 or None on a symmetric grid, `bits` and `block`.
    """
    columns = weight.codes.shape[1]
    bits, block = stored_bits(weight.grid), block_of(weight.grid, columns)
    blocks = -(-columns // block)
    codes = nn.functional.pad(weight.codes, (0, blocks * block - columns))
    times = blocks if weight.grid.group_size == -1 else weight.grid.group_size // block
    scales, zeros = (part.repeat_interleave(times, 1)[:, :blocks] for part in (weight.scale.float(), weight.zero_point))
    return {
        "codes": pack_bytes(unsigned(codes, bits), bits),
        "scales": scales.contiguous(),
        "zero_points": None if weight.grid.symmetric else pack_bytes(unsigned(zeros, bits), bits),
        "bits": bits,
        "block": block,
    }


def halves(weight: QuantizedTensor) -> list[QuantizedTensor]:
    """A weight of 8 bits as the sum of two of 4: 16 · (upper half of each code) + (lower half), exactly.

    onnxruntime (1.32) has kernels for 4 bits and float32 inputs; of 8 bits it unpacks the layer for every product.
    """
    grid = replace(weight.grid, bits=4, symmetric=False)
    parts = [(weight.codes >> 4, weight.zero_point >> 4), ((weight.codes & 15) - 8, (weight.zero_point & 15) - 8)]
    scales = (16 * weight.scale.float(), weight.scale.float())
    return [QuantizedTensor(codes, scale, zero, grid) for (codes, zero), scale in zip(parts, scales, strict=True)]


class Product(nn.Module):
    """Products with a weight [out, in] in codes, as one operator of the graph.

    Args:
        weight: the codes.
        level: accuracy level of the operator.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, weight: QuantizedTensor, level: int) -> None:
        super().__init__()
        form, (rows, columns) = blocks_of(weight), weight.codes.shape
        self.rows = rows
        facts = {"K": columns, "N": rows, "bits": form["bits"], "block_size": form["block"]}
        self.attributes: dict[str, Any] = {**facts, "accuracy_level": level}
        self.register_buffer("codes", form["codes"].reshape(rows, -1, form["block"] * form["bits"] // 8))
        self.register_buffer("scales", form["scales"])
        self.register_buffer("zero_points", form["zero_points"])

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] → [..., out]."""
        product: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MatMulNBits",
            [inputs, self.codes, self.scales, self.zero_points, None, bias],
            self.attributes,
            dtype=inputs.dtype,
            shape=(*inputs.shape[:-1], self.rows),
            version=1,
        )
        return product


class CodedLayer(nn.Module):
    """What a layer becomes that multiplies by codes; its own weight is not read any more."""

    products: nn.ModuleList
    bias: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        """The product with the weight, and the bias."""
        first, *others = self.products
        found: Tensor = first(inputs, self.bias)
        for product in others:
            found = found + product(inputs, None)
        return found


class CodedTable(nn.Embedding):
    """What a table becomes that is looked up in codes; its own weight is not read any more."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block: int

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, as one operator of the graph."""
        attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block, "bits": self.bits}
        zeros = [] if self.zero_points is None else [self.zero_points]
        rows: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::GatherBlockQuantized",
            [self.codes, input, self.scales, *zeros],
            attributes,
            dtype=torch.float32,
            shape=(*input.shape, self.embedding_dim),
            version=1,
        )
        return rows


def give_codes(layer: nn.Module, weight: QuantizedTensor, level: int) -> None:
    """Let a linear layer or a table compute from codes. `level` is the accuracy level of its products.

    Its class becomes one of both: what a class adds to the look-up, such as Gemma's factor, stays.
    """
    kind = CodedTable if isinstance(layer, nn.Embedding) else CodedLayer
    own = type(layer)
    bases = (kind,) if own is nn.Embedding else (kind, own) if kind is CodedLayer else (own, kind)
    layer.__class__ = type(f"Coded{own.__name__}", bases, {})
    if kind is CodedLayer:
        split = weight.grid.bits == 8 and level == EXACT
        parts = halves(weight) if split else [weight]
        layer.products = nn.ModuleList(Product(part, level) for part in parts)
        return
    form: Any = blocks_of(weight)
    # the rows of a table have no padding
    form["codes"] = form["codes"][:, : -(-weight.codes.shape[1] * form["bits"] // 8)].contiguous()
    for name in ("codes", "scales", "zero_points"):
        layer.register_buffer(name, form[name], persistent=False)
    for name in ("bits", "block"):
        setattr(layer, name, form[name])


def layers_of(model: Any, stored: Iterable[str]) -> Mapping[str, str]:
    """Layer or table of a model → its name on disk, tied ones included; `stored` are names of weights on disk."""
    names = rename(model, stored)[0]
    names |= {name: names[leader] for name, leader in tied_names(model).items() if leader in names}
    return {
        name.removesuffix(".weight"): disk.removesuffix(".weight")
        for name, disk in names.items()
        if name.endswith(".weight")
    }
