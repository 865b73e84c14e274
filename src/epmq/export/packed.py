"""compressed-tensors `pack-quantized`: what vLLM and transformers read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epmq.quantization.grid import Grid, QuantizedTensor

NEEDS_LINEAR = True


def tensors(prefix: str, layer: nn.Module, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for one layer's weight.

    Args:
        prefix: the layer's name on disk.
        layer: its module.
        weight: the codes.

    Returns:
        `weight_packed` [out, ⌈in·bits/32⌉] int32, `weight_scale` [out, groups], `weight_shape` [2] int64 and, on an
        asymmetric grid, `weight_zero_point` [⌈out·bits/32⌉, groups] int32.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = weight.grid.bits
    packed = {
        f"{prefix}.weight_packed": pack_to_int32(weight.codes, bits),
        f"{prefix}.weight_scale": weight.scale,
        f"{prefix}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.grid.symmetric:
        packed[f"{prefix}.weight_zero_point"] = pack_to_int32(weight.zero_point, bits, packed_dim=0)
    return packed


def stored_bytes(rows: int, columns: int, grid: Grid, dtype: torch.dtype) -> int:
    """Bytes of the tensors that stand for one layer's weight.

    Args:
        rows, columns: of the weight.
        grid: its grid.
        dtype: of the scales.
    """
    groups = columns // grid.width(columns)
    words = rows * -(-columns * grid.bits // 32)
    if not grid.symmetric:
        words += -(-rows * grid.bits // 32) * groups
    return 4 * words + rows * groups * dtype.itemsize + 2 * torch.int64.itemsize


def config(grid: Grid, ignore: list[str]) -> dict[str, Any] | None:
    """The `quantization_config` of `config.json`.

    Args:
        grid: the grid of all quantized layers.
        ignore: names of the linear layers that are not quantized.
    """
    from compressed_tensors.quantization import QuantizationConfig

    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }
    content = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ignore,
        }
    ).model_dump(mode="json")
    content["quant_method"] = "compressed-tensors"
    if not grid.symmetric:
        # transformers 5.23 reads packed zero points only if it may unpack on load; others do not know the field.
        content["dequantize"] = True
    return content
