"""compressed-tensors: `pack-quantized`, which vLLM and transformers read, with tables of 8 bits as plain int8."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from epmq.export.form import Form, in_block
from epmq.models.checkpoint import TensorSpec
from epmq.models.loading import TRANSPOSED
from epmq.quantization.grid import Grid, QuantizedTensor

PACKED, INT8 = "pack-quantized", "int-quantized"
# Entries that are packed at once.
CHUNK = 1 << 22


def format_of(form: Form) -> str:
    """The format of one weight: transformers (5.23) opens a table only if it has a tensor of its own shape."""
    return INT8 if form.table and form.grid.bits == 8 else PACKED


def specs(layer: str, shape: tuple[int, int], form: Form) -> dict[str, TensorSpec]:
    """Codes and zero points packed into 32-bit words or as int8, scales, and the shape; see `epmq.export.Format`."""
    rows, columns = shape
    groups, grid = columns // form.grid.width(columns), form.grid
    if format_of(form) == INT8:
        plain: dict[str, TensorSpec] = {f"{layer}.weight": ("I8", shape)}
        for name in (layer, *form.followers):
            plain[f"{name}.weight_scale"] = (form.scale_name, (rows, groups))
            plain |= {} if grid.symmetric else {f"{name}.weight_zero_point": ("I8", (rows, groups))}
        return plain
    words, row_words = (-(-numbers * grid.bits // 32) for numbers in (columns, rows))
    packed: dict[str, TensorSpec] = {
        f"{layer}.weight_packed": ("I32", (rows, words)),
        f"{layer}.weight_scale": (form.scale_name, (rows, groups)),
        f"{layer}.weight_shape": ("I64", (2,)),
    }
    if not grid.symmetric:
        packed[f"{layer}.weight_zero_point"] = ("I32", (row_words, groups))
    return packed


def tensors(layer: str, weight: QuantizedTensor, form: Form) -> dict[str, Tensor]:
    """`weight_packed` [out, ⌈in·bits/32⌉] int32, `weight_scale` [out, groups], `weight_shape` [2] int64 and, on an
    asymmetric grid, `weight_zero_point` [⌈out·bits/32⌉, groups] int32.

    Of a table of 8 bits `weight` [out, in] int8, `weight_scale` and `weight_zero_point` [out, groups] int8; the last
    two for each layer that has the same weight, too: transformers unpacks it for each.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, symmetric = weight.grid.bits, weight.grid.symmetric
    if format_of(form) == INT8:
        plain = {f"{layer}.weight": weight.codes}
        for name in (layer, *form.followers):
            plain[f"{name}.weight_scale"] = weight.scale
            plain |= {} if symmetric else {f"{name}.weight_zero_point": weight.zero_point}
        return plain
    packed = {
        f"{layer}.weight_packed": torch.cat([pack_to_int32(part, bits) for part in _chunks(weight.codes)]),
        f"{layer}.weight_scale": weight.scale,
        f"{layer}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if not symmetric:
        packed[f"{layer}.weight_zero_point"] = pack_to_int32(weight.zero_point, bits, packed_dim=0)
    return packed


def weight(layer: str, read: Callable[[str], Tensor], form: Form) -> Tensor:
    """The weight [out, in] of the codes, in the dtype of the form."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    grid, scale = form.grid, read(f"{layer}.weight_scale")
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    if format_of(form) == INT8:
        codes = read(f"{layer}.weight")
        zero = zero if grid.symmetric else read(f"{layer}.weight_zero_point")
        return QuantizedTensor(codes, scale, zero, grid, form.dtype).dequantize()
    columns = int(read(f"{layer}.weight_shape")[1])
    words = _chunks(read(f"{layer}.weight_packed"))
    codes = torch.cat([unpack_from_int32(part, grid.bits, torch.Size([len(part), columns])) for part in words])
    if not grid.symmetric:
        zero = unpack_from_int32(read(f"{layer}.weight_zero_point"), grid.bits, scale.shape, packed_dim=0)
    return QuantizedTensor(codes, scale, zero, grid, form.dtype).dequantize()


def _chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time: packing takes many times the memory of what it packs."""
    return torch.split(matrix, max(1, CHUNK // max(1, matrix.shape[1])))


def config(forms: Mapping[str, Form], ignore: list[str]) -> dict[str, Any] | None:
    """The `quantization_config` of compressed-tensors; see `epmq.export.Format`.

    The grid that most layers have is that of all linear layers; those on another one are named, and so are layers
    outside the blocks: tables are no linear layers, and an output layer is none to vLLM. Names come first: the library
    warns of those that follow a class that their layers are of. `transposed`, a field of ours, names the layers whose
    modules store [in, out]: their codes are [out, in] as all are.
    """
    from compressed_tensors.quantization import QuantizationConfig

    groups: dict[tuple[str, Grid], list[str]] = {}
    for name, form in forms.items():
        groups.setdefault((format_of(form), form.grid), []).extend((name, *form.followers))
    linear = max((key for key in groups if key[0] == PACKED), key=lambda key: len(groups[key]), default=None)
    ordered = sorted(groups, key=lambda key: key != linear)
    formats = {name for name, _ in groups}
    fields = {
        "config_groups": {
            f"group_{number}": {
                "targets": _named(groups[key], all_of_them=key != linear) + ["Linear"] * (key == linear),
                "weights": _weights(key[1]),
                "format": key[0],
            }
            for number, key in enumerate(ordered)
        },
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
    }
    content: dict[str, Any] = QuantizationConfig.model_validate(fields).model_dump(mode="json")
    content["quant_method"] = "compressed-tensors"
    if transposed := sorted(name for name, form in forms.items() if form.transposed):
        content[TRANSPOSED] = transposed
    if len(groups) == 1 and not ordered[0][1].symmetric:
        # transformers 5.23 reads packed zero points only if it may unpack on load, which it does with the first grid
        # for all layers; others do not know the field.
        content["dequantize"] = True
    return content


def _named(layers: list[str], all_of_them: bool) -> list[str]:
    """The layers of a group that it names."""
    return [name for name in dict.fromkeys(layers) if all_of_them or not in_block(name)]


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }
