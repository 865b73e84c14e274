"""PyTorch's kernels that multiply few rows by a weight in codes, where this device has one that gives what it should.

They compute in bfloat16: products are off by less than 0.6 percent, which tests hold them to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from epmq.models.codes import signed, unsigned
from epmq.quantization.grid import QuantizedTensor

# Rows of inputs up to which kernels are asked: on two processors with AVX2, 64 are dearer than making the weight anew.
FEW_ROWS = 32
# Columns that may share a scale in the kernels for 4 bits.
GROUPS = (256, 128, 64, 32)
# Largest error of a kernel's product, as a share of it: bfloat16 makes about 0.003.
TOLERANCE = 0.02
# Entries of a weight that are made at once: few enough for the cache, many enough for the overhead of a call.
CHUNK = 1 << 18
# What the columns of 8-bit codes must be a multiple of: with a rest, the kernel reads beyond the end, and crashes.
WHOLE = 32
# Processors for which the kernels have vector code; elsewhere they are slower than making the weight.
VECTORS = ("AVX2", "AVX512")


def row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows of about `CHUNK` entries, which begin at multiples of 64: no tile of a kernel is cut."""
    rows, columns = shape
    step = max(1, CHUNK // max(1, columns) // 64) * 64
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class Layout:
    """How a kernel orders 4-bit codes: tiles of a weight one after the other, row by row of tiles.

    Attributes:
        rows, columns: of a tile.
        order: [rows · columns] place of each code of a tile, row by row, among the tile's low half bytes and, behind
            them, its high ones; None where all are in their place.
    """

    rows: int
    columns: int
    order: Tensor | None = None

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Unsigned codes [out, columns] uint8 of some rows of tiles, uint8 in any shape."""
        count = self.rows * self.columns
        tiles = packed.reshape(-1, columns // self.columns, count // 2).mT.contiguous()
        halves = torch.cat([tiles & 15, tiles >> 4], dim=1)
        halves = halves if self.order is None else halves[:, self.order]
        codes: Tensor = halves.unflatten(1, (self.rows, self.columns)).transpose(2, 3).reshape(-1, columns)
        return codes


def _convert_cpu(codes: Tensor) -> Tensor:
    """Unsigned codes [out, in] uint8 in the layout of the processor's kernel, uint8 [out, in / 2]."""
    made: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return made


def _convert_cuda(codes: Tensor, tiles: int) -> Tensor:
    """The same for CUDA, int32 [out / 8, in / (16 · tiles), 32, tiles / 2]; `tiles` is 2, 4 or 8."""
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    made: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return made


@cache
def _layout(device: torch.device, rows: int, columns: int) -> Layout | None:
    """The layout of a device with tiles of that size; None where its kernel has another one, or there is none.

    It is found out: places written in digits of 4 bits are converted, digit by digit.
    """
    places = torch.arange(rows * columns, device=device).reshape(rows, columns).repeat(1, -(-32 // columns))
    try:
        digits = [_converter(device, columns)(((places >> shift) & 15).to(torch.uint8)) for shift in (0, 4, 8)]
    except (RuntimeError, AttributeError):
        return None
    plain, straight = Layout(rows, columns), torch.arange(rows * columns, device=device)
    read = [plain.unpack(digit.view(torch.uint8), places.shape[1]).long() for digit in digits]
    found = (read[0] | read[1] << 4 | read[2] << 8)[:, :columns].flatten()
    if not torch.equal(found.sort().values, straight):
        return None
    return plain if torch.equal(found, straight) else Layout(rows, columns, found.argsort())


def _converter(device: torch.device, columns: int) -> Callable[[Tensor], Tensor]:
    return _convert_cpu if device.type == "cpu" else partial(_convert_cuda, tiles=columns // 16)


def _tiles(device: torch.device, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of tiles that a device's kernel may have, and that divide a weight."""
    sizes = [(64, 1), (32, 1), (16, 1)] if device.type == "cpu" else [(8, 128), (8, 64), (8, 32)]
    return [size for size in sizes if all(total % part == 0 for total, part in zip(shape, size))]


class Int4(nn.Module):
    """A kernel's own form of a weight [out, in] of 4-bit codes, which takes the place of that on disk.

    Attributes:
        packed: the codes in the kernel's layout.
        scales: [groups, out, 2] bfloat16, scale and −zero point · scale.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedTensor, layout: Layout, group: int) -> None:
        super().__init__()
        self.columns, self.layout, self.group = weight.codes.shape[1], layout, group
        device, codes = weight.codes.device, unsigned(weight.codes, 4)
        self.register_buffer("packed", _converter(device, layout.columns)(codes))
        scale = weight.scale.float()
        scales = torch.stack([scale, -weight.zero_point.float() * scale], dim=-1)
        repeats = self.columns // group // scale.shape[1]
        self.register_buffer("scales", scales.repeat_interleave(repeats, 1).transpose(0, 1).contiguous().bfloat16())

    @classmethod
    def of(cls, weight: QuantizedTensor) -> "Int4 | None":
        """The kernel's form of a weight; None where its grid, its shape or the device does not suit."""
        shape, device = (weight.codes.shape[0], weight.codes.shape[1]), weight.codes.device
        width = weight.grid.width(shape[1])
        group = next((group for group in GROUPS if width % group == 0), None)
        if weight.grid.bits != 4 or group is None:
            return None
        for tile in _tiles(device, shape):
            layout = _layout(device, *tile)
            made = None if layout is None else cls(weight, layout, group)
            parts = () if made is None else row_chunks(shape)
            if made is not None and all(torch.equal(made.codes(rows), weight.codes[rows]) for rows in parts):
                return made
        return None

    def codes(self, rows: slice) -> Tensor:
        """Codes [rows, in] int8 of some rows, which begin and end where tiles do."""
        start, end, _ = rows.indices(self.packed.numel() * self.packed.element_size() * 2 // self.columns)
        flat = self.packed.flatten().view(torch.uint8)
        part = flat[start * self.columns // 2 : end * self.columns // 2]
        return signed(self.layout.unpack(part, self.columns), 4)

    def multiply(self, inputs: Tensor) -> Tensor:
        """inputs [rows, in] · weightᵀ, in their dtype, computed in bfloat16."""
        cpu = inputs.device.type == "cpu"
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if cpu else torch.ops.aten._weight_int4pack_mm
        made: Tensor = product(inputs.bfloat16().contiguous(), self.packed, self.group, self.scales)
        return made.to(inputs.dtype)


class Int8(nn.Module):
    """A weight [out, in] of 8-bit codes with one scale a row and no zero point, as it is on disk: a kernel takes that.

    Attributes:
        held: the codes, int8.
        scale: [out, 1] as stored.
    """

    held: Tensor
    scale: Tensor

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("held", weight.codes)
        self.register_buffer("scale", weight.scale)

    @classmethod
    def of(cls, weight: QuantizedTensor) -> "Int8 | None":
        """The kernel's form of a weight; None where its grid does not suit."""
        on_grid = weight.grid.bits == 8 and weight.grid.symmetric and weight.scale.shape[1] == 1
        return cls(weight) if on_grid and weight.codes.shape[1] % WHOLE == 0 else None

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Codes [rows, in] int8 of some rows."""
        return self.held[rows]

    def multiply(self, inputs: Tensor) -> Tensor:
        """inputs [rows, in] · weightᵀ, in their dtype, with products in bfloat16."""
        ones = torch.ones(len(self.held), dtype=torch.bfloat16, device=self.held.device)
        made: Tensor = torch.ops.aten._weight_int8pack_mm(inputs.bfloat16().contiguous(), self.held, ones)
        return made.to(inputs.dtype) * self.scale.flatten().to(inputs.dtype)


def fitting(weight: QuantizedTensor, table: bool) -> Int4 | Int8 | None:
    """The kernel that multiplies by a weight, tried on a random input; None where there is none, or it errs.

    `table` says that rows of the weight are looked up as well: 4-bit codes keep their order then, and have no kernel.
    """
    device = weight.codes.device.type
    if device not in ("cpu", "cuda") or (device == "cpu" and torch.backends.cpu.get_cpu_capability() not in VECTORS):
        return None
    try:
        kernel = Int8.of(weight) or (None if table else Int4.of(weight))
        return kernel if kernel is not None and _is_right(kernel.multiply, weight) else None
    except (RuntimeError, AttributeError):  # no such kernel, or not for such a weight
        return None


def _is_right(multiply: Callable[[Tensor], Tensor], weight: QuantizedTensor) -> bool:
    """Whether a product is that with the dequantized weight, on a random input of 4 rows."""
    shape = (weight.codes.shape[0], weight.codes.shape[1])
    inputs = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(0)).to(weight.codes.device)
    parts = [inputs @ weight.rows(rows).dequantize().float().T for rows in row_chunks(shape)]
    expected = torch.cat(parts, dim=1)
    return bool((multiply(inputs) - expected).norm() <= TOLERANCE * expected.norm())
