"""Layers and tables as onnxruntime's operators on codes: `MatMulNBits` and `GatherBlockQuantized`.

The operators are those of `com.microsoft` (docs/ContribOperators.md of onnxruntime): codes unsigned, low bits first, in
blocks of columns that share a scale and a zero point.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.models.codes import pack_bytes, unsigned
from epmq.models.packed import PackedWeight
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


class Table(nn.Module):
    """Rows of a weight [rows, features] in codes, looked up by one operator of the graph."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        form, self.features = blocks_of(weight), weight.codes.shape[1]
        facts = {"gather_axis": 0, "quantize_axis": 1, "block_size": form["block"], "bits": form["bits"]}
        self.attributes: dict[str, Any] = facts
        # its rows have no padding
        self.register_buffer("codes", form["codes"][:, : -(-self.features * form["bits"] // 8)].contiguous())
        self.register_buffer("scales", form["scales"])
        self.register_buffer("zero_points", form["zero_points"])

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., features]."""
        zeros = [] if self.zero_points is None else [self.zero_points]
        rows: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::GatherBlockQuantized",
            [self.codes, ids, self.scales, *zeros],
            self.attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.features),
            version=1,
        )
        return rows


class GraphWeight(nn.Module):
    """What takes the place of a `PackedWeight` in a graph: operators on its codes.

    Args:
        packed: the weight.
        level: accuracy level of products.
        multiplied, table: whether layers multiply by it, and whether rows of it are looked up.
    """

    def __init__(self, packed: PackedWeight, level: int, multiplied: bool, table: bool) -> None:
        super().__init__()
        weight = packed.quantized()
        parts = halves(weight) if weight.grid.bits == 8 and level == EXACT else [weight]
        self.products = nn.ModuleList(Product(part, level) for part in parts if multiplied)
        self.table = Table(weight) if table else None
        self.shape, self.dtype, self.scale = packed.shape, packed.dtype, packed.scale
        self.dequantize = packed.dequantize

    def suits(self, inputs: Tensor) -> bool:
        """Whether its products are by codes: all are."""
        return True

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """As of `PackedWeight`."""
        first, *others = self.products
        found: Tensor = first(inputs, bias)
        for product in others:
            found = found + product(inputs, None)
        return found

    by_kernel = linear

    def lookup(self, ids: Tensor) -> Tensor:
        """As of `PackedWeight`."""
        assert self.table is not None
        rows: Tensor = self.table(ids)
        return rows


def put_operators(model: nn.Module, level: int) -> None:
    """Let the layers and tables of a model that is held in codes compute by operators of a graph."""
    holders: dict[PackedWeight, list[nn.Module]] = {}
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if isinstance(packed, PackedWeight):
            holders.setdefault(packed, []).append(module)
    for packed, modules in holders.items():
        tables = [isinstance(module, nn.Embedding) for module in modules]
        made = GraphWeight(packed, level, not all(tables), any(tables))
        for module in modules:
            module.packed = made
