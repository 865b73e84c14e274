"""Layers and tables as onnxruntime's operators on codes: `MatMulNBits` and `GatherBlockQuantized`.

The operators are those of `com.microsoft` (docs/ContribOperators.md of onnxruntime): codes unsigned, low bits first, in
blocks of columns that share a scale and a zero point.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epmq.models.codes import pack_bytes, unsigned
from epmq.models.meta import rename, tied_names
from epmq.quantization.grid import Grid, QuantizedTensor

DOMAIN = "com.microsoft"
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


class CodedLayer(nn.Module):
    """What a layer becomes that multiplies by codes; its own weight is not read any more."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block: int
    level: int
    size: tuple[int, int]
    bias: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        """The product with the weight, and the bias, as one operator of the graph."""
        rows, columns = self.size
        codes = self.codes.reshape(rows, -1, self.block * self.bits // 8)
        attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": self.bits, "block_size": self.block}
        product: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MatMulNBits",
            [inputs, codes, self.scales, self.zero_points, None, self.bias],
            attributes | {"accuracy_level": self.level},
            dtype=inputs.dtype,
            shape=(*inputs.shape[:-1], rows),
            version=1,
        )
        return product


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
    form: Any = blocks_of(weight)
    columns = weight.codes.shape[1]
    if kind is CodedTable:  # its rows have no padding
        form["codes"] = form["codes"][:, : -(-columns * form["bits"] // 8)].contiguous()
    for name in ("codes", "scales", "zero_points"):
        layer.register_buffer(name, form[name], persistent=False)
    facts = {"bits": form["bits"], "block": form["block"], "level": level, "size": (len(weight.codes), columns)}
    for name, value in facts.items():
        setattr(layer, name, value)


def layers_of(model: Any, stored: Iterable[str]) -> Mapping[str, str]:
    """Layer or table of a model → its name on disk, tied ones included; `stored` are names of weights on disk."""
    names = rename(model, stored)[0]
    names |= {name: names[leader] for name, leader in tied_names(model).items() if leader in names}
    return {
        name.removesuffix(".weight"): disk.removesuffix(".weight")
        for name, disk in names.items()
        if name.endswith(".weight")
    }
