"""GPTQ directories, version 1 of the format: for onnxruntime-genai's builder, and for older consumers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.export.form import in_block
from epmq.export.target import Coded, Contents, refuse_grid
from epmq.files import write_json
from epmq.models.checkpoint import DTYPE_NAMES, TensorSpec
from epmq.models.codes import CodedCheckpoint, pack_bytes
from epmq.models.side_files import CONFIG, copy_files, side_files
from epmq.models.writer import CheckpointWriter
from epmq.quantization.grid import Grid, QuantizedTensor

TITLE = "onnxruntime-genai's builder and other consumers of GPTQ directories; not run"
PACKAGES: tuple[str, ...] = ()
EXTRA: str | None = None
RUNTIME: str | None = None

FOLDER = "gptq"
# Bits of which whole codes fill a 32-bit word, and which the consumers unpack.
BITS = (2, 4, 8)
WORD = 32
# Groups as which a scale a row is written: the consumers want groups of a power of two. The first that divides.
GROUPS = (64, 32, 16)
# The leaves of a layer, in the order in which they are written.
LEAVES = ("qweight", "qzeros", "scales", "g_idx")


def check(contents: Contents) -> None:
    """Refuse what the format cannot hold: see `epmq.export.target.Target`.

    It has one grid for all linear layers of the blocks, words of whole codes and scales of float16. Tables, output
    layer and all else outside the blocks are stored plain, whatever their grid is.
    """
    layers = {name: coded for name, coded in contents.layers.items() if in_block(name)}
    if not layers:
        raise InputError("gptq: no layer of a block is quantized, and the format holds no others")
    grid = _common_grid(layers)
    group = group_of(grid, {name: coded.shape for name, coded in layers.items()})
    for name, coded in layers.items():
        _check_layer(name, coded, group)
    kinds = {_kind(name) for name in layers}
    for name in contents.plain:
        if name.endswith(".weight") and _kind(name.removesuffix(".weight")) in kinds:
            raise InputError(
                f"gptq: {name.removesuffix('.weight')} is not quantized, and the format has one grid for all linear "
                "layers of the blocks: remove the override that skips it"
            )


def write(source: CodedCheckpoint, folder: Path) -> list[Path]:
    """Write the directory `gptq` in a folder: weights, `config.json` and what lies beside them.

    Of a layer [out, in] these are `qweight` int32 [in·bits/32, out], `qzeros` int32 [groups, out·bits/32], `scales`
    float16 [groups, out] and `g_idx` int32 [in]. Codes are unsigned, low bits first; zero points are stored less one.

    Raises:
        InputError: a scale is no float16, or a zero point is the lowest code, of which there is no place for one less.
    """
    output = folder / FOLDER
    output.mkdir()
    copy_files(side_files(source.checkpoint.path), output)
    grids = {name: grid for name, grid in source.grids.items() if in_block(name)}
    grid = next(iter(grids.values()))
    group = group_of(grid, {name: source.shape(name) for name in grids})
    write_json(output / CONFIG, {**source.config, "quantization_config": quantization_config(grid, group)})
    with CheckpointWriter(output, dict(_specs(source, group))) as writer:
        for name in source.weights():
            layer = name.removesuffix(".weight")
            tensors = layer_tensors(layer, source.codes(layer), group) if layer in grids else None
            for stored, tensor in ({name: source.tensor(name)} if tensors is None else tensors).items():
                writer.write(stored, tensor)
        writer.finish()
        return [output / file for file in writer.files]


def quantization_config(grid: Grid, group: int) -> dict[str, Any]:
    """What `config.json` says of the weights."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": group,
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def group_of(grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Columns that share a scale in the output: a scale a row is repeated over groups that divide every layer.

    Raises:
        InputError: no group divides a layer; it is named.
    """
    if grid.group_size != -1:
        return grid.group_size
    for name, (_, columns) in shapes.items():
        if columns % GROUPS[-1]:
            raise InputError(
                f"gptq: the {columns} columns of {name} are no multiple of {GROUPS[-1]}, the smallest of its groups"
            )
    return next(size for size in GROUPS if all(columns % size == 0 for _, columns in shapes.values()))


def layer_tensors(layer: str, weight: QuantizedTensor, group: int) -> dict[str, Tensor]:
    """The tensors that stand for a layer, by their names; shapes and errors are those of `write`."""
    grid, columns = weight.grid, weight.codes.shape[1]
    repeats = columns // group // weight.scale.shape[1]
    scale, lowest = weight.scale.half(), weight.grid.lowest
    if not torch.equal(scale.to(weight.scale.dtype), weight.scale):
        raise InputError(f"gptq: scales of {layer} are too small or too fine for float16: use scale_dtype: float16")
    if int(weight.zero_point.min()) == lowest:
        raise InputError(
            f"gptq: a zero point of {layer} is the lowest code, and the format, which stores zero points less one, has "
            "no place for it: use symmetric: true"
        )
    zeros = weight.zero_point.to(torch.int32) - lowest - 1
    tensors = {
        "qweight": pack_rows(weight.codes.T.to(torch.int32) - lowest, grid.bits),
        "qzeros": pack_rows(zeros.repeat_interleave(repeats, dim=1), grid.bits).T,
        "scales": scale.repeat_interleave(repeats, dim=1).T,
        "g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }
    return {f"{layer}.{leaf}": tensors[leaf] for leaf in LEAVES}


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, columns] int32 as words [rows · bits / 32, columns] int32, first rows in the low bits."""
    packed = pack_bytes(codes.T.to(torch.uint8), bits).flatten()
    return packed.view(torch.int32).reshape(codes.shape[1], -1).T


def _common_grid(layers: Mapping[str, Coded]) -> Grid:
    """The one grid of all layers; an InputError names one that has another than most."""
    grids = [coded.grid for coded in layers.values()]
    most = max(dict.fromkeys(grids), key=grids.count)
    for name, coded in layers.items():
        if coded.grid != most:
            raise refuse_grid("gptq", name, coded.grid, most)
    return most


def _check_layer(name: str, coded: Coded, group: int) -> None:
    """Refuse a layer that the format cannot hold."""
    grid, (rows, columns), form = coded.grid, coded.shape, coded.form
    if form.transposed:
        raise InputError(f"gptq: {name} is stored as [in, out], which no consumer of the format reads: use another one")
    if grid.bits not in BITS:
        raise refuse_grid("gptq", name, grid, replace(grid, bits=grid.bits + 1))
    if form.scale not in (torch.float16, torch.bfloat16):
        raise InputError(f"gptq: it has scales of float16, and those of {name} are float32: use scale_dtype: float16")
    codes = WORD // grid.bits
    if rows % codes or columns % codes or columns % group:
        raise InputError(f"gptq: {name} is [{rows}, {columns}], which are no multiples of the {codes} codes of a word")


def _kind(layer: str) -> str:
    """The name of a layer without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", layer, count=1) if in_block(layer) else layer


def _specs(source: CodedCheckpoint, group: int) -> Iterator[tuple[str, TensorSpec]]:
    """Name, dtype and shape of every tensor of the output."""
    for name in source.weights():
        layer = name.removesuffix(".weight")
        if layer in source.grids and in_block(layer):
            (rows, columns), bits = source.shape(layer), source.grids[layer].bits
            yield f"{layer}.qweight", ("I32", (columns * bits // WORD, rows))
            yield f"{layer}.qzeros", ("I32", (columns // group, rows * bits // WORD))
            yield f"{layer}.scales", ("F16", (columns // group, rows))
            yield f"{layer}.g_idx", ("I32", (columns,))
        elif layer in source.grids:
            dtype = source.dtype or source.checkpoint.dtype(f"{layer}.weight_scale")
            assert dtype is not None
            yield name, (DTYPE_NAMES[dtype], source.shape(layer))
        else:
            yield name, source.checkpoint.spec(name)
