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


class Float32Checkpoint(CodedCheckpoint):
    """The same model without codes: all that is a float is float32."""

    def __init__(self, source: CodedCheckpoint) -> None:
        super().__init__(source.checkpoint.path)
        self.plain, self.grids, self._source = list(source.weights()), {}, source

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in full precision."""
        tensor = self._source.tensor(name)
        return tensor.float() if torch.is_floating_point(tensor) else tensor


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
    return signed(unpack_bytes(words.contiguous().view(torch.uint8), bits)[:, :columns], bits)


# Codes of one or of three bytes are drawn apart to a byte each, in an integer with a byte a code, in steps: how far the
# upper half of them is shifted, and what stays then.
_STEPS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (torch.int64, ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: (torch.int16, ((4, 0x0F0F),)),
}


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, codes] uint8 from bytes [rows, bytes], low bits first; 2, 3, 4 or 8 bits.

    Three bytes hold 8 codes of 3 bits; all others lie in one byte.
    """
    if bits == 8:
        return packed
    dtype, steps = _STEPS[bits]
    if bits == 3:
        parts = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).unflatten(1, (-1, 3)).to(dtype)
        words = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    else:
        words = packed.to(dtype, memory_format=torch.contiguous_format)
    for shift, mask in steps:
        words = (words | words << shift) & mask
    unsigned_codes: Tensor = words.view(torch.uint8)
    return unsigned_codes


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_bytes`: bytes [rows, bytes] of unsigned codes [rows, codes] uint8, padded by zeros."""
    if bits == 8:
        return codes
    count, width = (8, 3) if bits == 3 else (8 // bits, 1)
    grouped = torch.nn.functional.pad(codes, (0, -codes.shape[1] % count)).unflatten(1, (-1, count))
    word = torch.zeros(grouped.shape[:2], dtype=torch.int32 if width > 1 else torch.uint8, device=codes.device)
    for place in range(count):
        word |= grouped[..., place].to(word.dtype) << bits * place
    if width == 1:
        return word
    return torch.stack([(word >> 8 * place).to(torch.uint8) for place in range(width)], dim=-1).flatten(1)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes as they are on the grid, int8, from unsigned ones, uint8, which have 2^(bits−1) added."""
    # In eight bits the sum with 128 is a flip of the highest bit.
    return (codes ^ 128).view(torch.int8) if bits == 8 else codes.view(torch.int8) - (1 << (bits - 1))


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 with 2^(bits−1) added, from those on the grid, int8."""
    return codes.view(torch.uint8) ^ 128 if bits == 8 else (codes + (1 << (bits - 1))).view(torch.uint8)
