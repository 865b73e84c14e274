"""compressed-tensors `pack-quantized`: what vLLM and transformers read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epmq.models.checkpoint import TensorSpec
from epmq.quantization.grid import Grid, QuantizedTensor

HOLDS_TRANSPOSED = False


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
        f"{layer}.weight_packed": pack_to_int32(weight.codes, bits),
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
    codes = unpack_from_int32(read(f"{layer}.weight_packed"), grid.bits, shape)
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    if not grid.symmetric:
        zero = unpack_from_int32(read(f"{layer}.weight_zero_point"), grid.bits, scale.shape, packed_dim=0)
    return QuantizedTensor(codes, scale, zero, grid).dequantize()


def config(grid: Grid, ignore: list[str]) -> dict[str, Any] | None:
    """The `quantization_config` of compressed-tensors; see `epmq.export.Format`."""
    from compressed_tensors.quantization import QuantizationConfig

    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }
    fields = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
    }
    content: dict[str, Any] = QuantizationConfig.model_validate(fields).model_dump(mode="json")
    content["quant_method"] = "compressed-tensors"
    if not grid.symmetric:
        # transformers 5.23 reads packed zero points only if it may unpack on load; others do not know the field.
        content["dequantize"] = True
    return content
