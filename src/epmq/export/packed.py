"""compressed-tensors `pack-quantized`: what vLLM and transformers read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from epmq.models.checkpoint import TensorSpec
from epmq.quantization.grid import Grid, QuantizedTensor

HOLDS_TRANSPOSED = False
# Entries that are packed at once.
CHUNK = 1 << 22


def _chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time: packing takes many times the memory of what it packs."""
    return torch.split(matrix, max(1, CHUNK // max(1, matrix.shape[1])))


def specs(layer: str, shape: tuple[int, int], grid: Grid, dtype: str, transposed: bool) -> dict[str, TensorSpec]:
    """Codes and zero points packed into 32-bit words, scales, and the shape; see `epmq.export.Format`."""
    rows, columns = shape
    groups = columns // grid.width(columns)
    words, row_words = (-(-numbers * grid.bits // 32) for numbers in (columns, rows))
    packed: dict[str, TensorSpec] = {
        f"{layer}.weight_packed": ("I32", (rows, words)),
        f"{layer}.weight_scale": (dtype, (rows, groups)),
        f"{layer}.weight_shape": ("I64", (2,)),
    }
    if not grid.symmetric:
        packed[f"{layer}.weight_zero_point"] = ("I32", (row_words, groups))
    return packed


def tensors(layer: str, weight: QuantizedTensor, transposed: bool) -> dict[str, Tensor]:
    """`weight_packed` [out, ⌈in·bits/32⌉] int32, `weight_scale` [out, groups], `weight_shape` [2] int64 and, on an
    asymmetric grid, `weight_zero_point` [⌈out·bits/32⌉, groups] int32.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = weight.grid.bits
    packed = {
        f"{layer}.weight_packed": torch.cat([pack_to_int32(part, bits) for part in _chunks(weight.codes)]),
        f"{layer}.weight_scale": weight.scale,
        f"{layer}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.grid.symmetric:
        packed[f"{layer}.weight_zero_point"] = pack_to_int32(weight.zero_point, bits, packed_dim=0)
    return packed


def weight(layer: str, read: Callable[[str], Tensor], grid: Grid, transposed: bool) -> Tensor:
    """The weight [out, in] of the codes, in the dtype of the scales."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale, shape = read(f"{layer}.weight_scale"), torch.Size(read(f"{layer}.weight_shape").tolist())
    words = _chunks(read(f"{layer}.weight_packed"))
    codes = torch.cat([unpack_from_int32(part, grid.bits, torch.Size([len(part), shape[1]])) for part in words])
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    if not grid.symmetric:
        zero = unpack_from_int32(read(f"{layer}.weight_zero_point"), grid.bits, scale.shape, packed_dim=0)
    return QuantizedTensor(codes, scale, zero, grid).dequantize()


def config(grids: Mapping[str, Grid], ignore: list[str]) -> dict[str, Any] | None:
    """The `quantization_config` of compressed-tensors; see `epmq.export.Format`.

    The grid that most layers have is that of all linear layers; those on another one, tables among them, are named.
    """
    from compressed_tensors.quantization import QuantizationConfig

    by_grid: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        by_grid.setdefault(grid, []).append(name)
    ordered = sorted(by_grid.items(), key=lambda item: -len(item[1]))
    groups = [(["Linear"] if not number else names, grid) for number, (grid, names) in enumerate(ordered)]
    fields = {
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": _weights(grid)}
            for number, (targets, grid) in enumerate(groups)
        },
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
    }
    content: dict[str, Any] = QuantizationConfig.model_validate(fields).model_dump(mode="json")
    content["quant_method"] = "compressed-tensors"
    if len(groups) == 1 and not groups[0][1].symmetric:
        # transformers 5.23 reads packed zero points only if it may unpack on load, which it does with the first grid
        # for all layers; others do not know the field.
        content["dequantize"] = True
    return content


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }
