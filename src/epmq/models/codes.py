"""A finished low-bit checkpoint, read as what it holds: codes on grids, and plain tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.models.checkpoint import Checkpoint
from epmq.models.loading import FORMATS, LEAVES, TRANSPOSED, group_of, stored_dtype
from epmq.quantization.grid import Grid, QuantizedTensor


class CodedCheckpoint:
    """The codes and the plain tensors of a packed checkpoint, one at a time, by their names on disk.

    Args:
        source: a directory, or a Hub id.

    Attributes:
        checkpoint: the files.
        config: content of `config.json`, without its `quantization_config`.
        grids: layer or table → the grid that its codes lie on.
        plain: names of the tensors that are not part of a quantized weight.
        dtype: in which weights are read back; None is that of the scales.
        transposed: layers whose modules store [in, out]; their codes are [out, in] all the same.

    Raises:
        FileNotFoundError: no such directory, or it holds no model.
        ValueError: the weights are not packed by compressed-tensors as integers in groups; what they are is said.
    """

    def __init__(self, source: str | Path) -> None:
        self.checkpoint = Checkpoint(source)
        self.config = dict(self.checkpoint.config)
        quantization: dict[str, Any] = self.config.pop("quantization_config", None) or {}
        if quantization.get("format") not in FORMATS:
            found = quantization.get("format") or quantization.get("quant_method") or "plain"
            raise InputError(
                f"{self.checkpoint.path}: its weights are {found}, so there are no codes; needed is a checkpoint of "
                "format: pack-quantized"
            )
        self.dtype = stored_dtype(self.config)
        self.transposed = frozenset[str](quantization.get(TRANSPOSED, ()))
        self.grids: dict[str, Grid] = {}
        self.plain: list[str] = []
        for name in self.checkpoint.names:
            layer, _, leaf = name.rpartition(".")
            if leaf not in LEAVES or f"{layer}.weight_scale" not in self.checkpoint:
                self.plain.append(name)
            elif leaf in ("weight", "weight_packed"):
                with_name = f"{self.checkpoint.path}: {layer}"
                self.grids[layer] = _grid(group_of(layer, quantization)["weights"], with_name)

    def codes(self, layer: str) -> QuantizedTensor:
        """The codes [out, in], scales and zero points [out, groups] of a layer or a table."""
        grid = self.grids[layer]
        scale = self.checkpoint.tensor(f"{layer}.weight_scale")
        zero = torch.zeros(scale.shape, dtype=torch.int8)
        if f"{layer}.weight" in self.checkpoint:
            codes = self.checkpoint.tensor(f"{layer}.weight")
            zero = zero if grid.symmetric else self.checkpoint.tensor(f"{layer}.weight_zero_point")
        else:
            rows, columns = self.shape(layer)
            codes = unpack(self.checkpoint.tensor(f"{layer}.weight_packed"), grid.bits, columns)
            if not grid.symmetric:
                packed = self.checkpoint.tensor(f"{layer}.weight_zero_point")
                zero = unpack(packed.T.contiguous(), grid.bits, rows).T.contiguous()
        return QuantizedTensor(codes, scale, zero, grid, self.dtype)

    def shape(self, layer: str) -> tuple[int, int]:
        """[out, in] of a layer or a table."""
        if f"{layer}.weight" in self.checkpoint:
            rows, columns = self.checkpoint.shape(f"{layer}.weight")
        else:
            rows, columns = self.checkpoint.tensor(f"{layer}.weight_shape").tolist()
        return rows, columns

    def tensor(self, name: str) -> Tensor:
        """A plain tensor as it is stored; a quantized weight dequantized, as its module stores it."""
        layer = name.removesuffix(".weight")
        if layer not in self.grids:
            return self.checkpoint.tensor(name)
        weight = self.codes(layer).dequantize()
        return weight.T.contiguous() if layer in self.transposed else weight

    def weights(self) -> Iterator[str]:
        """Names of all weights, plain and quantized, as a checkpoint in full precision has them."""
        yield from self.plain
        yield from (f"{layer}.weight" for layer in self.grids)


def _grid(weights: dict[str, Any], where: str) -> Grid:
    """The grid that a config group says weights lie on."""
    strategy, kind, actorder = (weights.get(name) for name in ("strategy", "type", "actorder"))
    if kind != "int" or strategy not in ("channel", "group") or actorder not in (None, "static", "weight"):
        order = f" with act order {actorder}" if actorder else ""
        raise InputError(f"{where}: codes of type {kind}, strategy {strategy}{order} cannot be exported")
    group = weights["group_size"] if strategy == "group" else -1
    return Grid(int(weights["num_bits"]), int(group), bool(weights["symmetric"]))


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Signed codes [rows, columns] int8 from 32-bit words [rows, ⌈columns·bits/32⌉], low bits first.

    As compressed-tensors packs them: each code is stored with 2^(bits−1) added.
    """
    if bits == 3:  # codes cross the bytes
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        codes: Tensor = unpack_from_int32(words, bits, torch.Size([len(words), columns]))
        return codes
    unsigned = unpack_bytes(words.contiguous().view(torch.uint8), bits)[:, :columns]
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, bytes · 8/bits] uint8 from bytes [rows, bytes], low bits first; 2, 4 or 8 bits."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).reshape(len(packed), -1)
