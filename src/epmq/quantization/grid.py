"""The quantization grid and what lies on it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq.errors import InputError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)


@dataclass(frozen=True)
class Grid:
    """Integer levels and how many weights share one scale.

    Codes are signed: −2^(bits−1) … 2^(bits−1) − 1, as compressed-tensors stores them.
    """

    bits: int = 4  # 2, 3, 4 or 8
    group_size: int = -1  # consecutive input columns that share a scale; −1 is one scale a row
    symmetric: bool = True  # no zero point

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def width(self, columns: int) -> int:
        """Columns in one group of a weight with that many input columns.

        Raises:
            ValueError: the group size does not divide them.
        """
        if self.group_size == -1:
            return columns
        if columns % self.group_size:
            raise InputError(f"group size {self.group_size} does not divide {columns} input columns")
        return self.group_size

    def scales(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Min–max scales and zero points of a weight [out, in], as compressed-tensors defines them; see `divide`.

        Scales are rounded to the dtype they are stored in *here*, before any solver runs, so that what is stored is
        what was optimised.

        Raises:
            ValueError: the group size does not divide the columns.
        """
        return self.divide(*self.range(weight), dtype)

    def range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest weight of each group, or 0 if it lies beyond: [out, groups] float32 both."""
        rows, columns = weight.shape
        grouped = weight.float().reshape(rows, -1, self.width(columns))
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def divide(self, low: Tensor, high: Tensor, dtype: torch.dtype, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups that range from `low` to `high`.

        Args:
            low, high: [out, groups] float32.
            dtype: dtype the scales are stored in.
            shrink: factor on the range before it is divided into steps; below 1 the extremes are clipped.

        Returns:
            scale [out, groups] in `dtype` and zero point [out, groups] int8 (zeros on a symmetric grid).
        """
        steps, low, high = self.highest - self.lowest, low * shrink, high * shrink
        scale = (torch.maximum(-low, high) / (steps / 2) if self.symmetric else (high - low) / steps).to(dtype)
        # Scales of zero (a group of zeros) take the dtype's epsilon, as in compressed-tensors.
        scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
        if self.symmetric:
            return scale, torch.zeros_like(scale, dtype=torch.int8)
        zero = (self.lowest - low / scale.float()).round().clamp(self.lowest, self.highest)
        return scale, zero.to(torch.int8)


@dataclass
class QuantizedTensor:
    """A weight on its grid. The codes are the source of truth: exporters pack them and never round again."""

    codes: Tensor  # [out, in] int8
    scale: Tensor  # [out, groups] in the stored dtype
    zero_point: Tensor  # [out, groups] int8 (zeros on a symmetric grid)
    grid: Grid
    dtype: torch.dtype | None = None  # in which it is read back; None is that of the scales

    def dequantize(self) -> Tensor:
        """(codes − zero point) · scale, [out, in], computed in `dtype`, as compressed-tensors does."""
        rows, columns = self.codes.shape
        scale = self.scale.to(self.dtype or self.scale.dtype)
        # By way of float32 a processor makes half precision of int8 five times as fast, and of such a number exactly.
        codes = self.codes.float() if self.codes.device.type == "cpu" else self.codes
        grouped = codes.reshape(rows, scale.shape[1], self.grid.width(columns)).to(scale.dtype)
        if not self.grid.symmetric:
            grouped = grouped - self.zero_point.to(scale.dtype).unsqueeze(-1)
        return (grouped * scale.unsqueeze(-1)).reshape(rows, columns)

    def to(self, device: torch.device) -> "QuantizedTensor":
        """The same on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("codes", "scale", "zero_point")}
        return replace(self, **tensors)

    def rows(self, rows: slice | Tensor) -> "QuantizedTensor":
        """Some rows of it."""
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero_point=self.zero_point[rows])

    def split(self, rows: list[int]) -> "list[QuantizedTensor]":
        """Cut stacked layers apart again; `rows` are their output sizes."""
        parts = zip(*(torch.split(tensor, rows) for tensor in (self.codes, self.scale, self.zero_point)))
        return [QuantizedTensor(codes, scale, zero, self.grid, self.dtype) for codes, scale, zero in parts]


def join_rows(parts: Iterable[QuantizedTensor]) -> QuantizedTensor:
    """Rows of a quantized tensor, put together."""
    pieces = list(parts)
    if len(pieces) == 1:
        return pieces[0]
    codes, scale, zero = (
        torch.cat([getattr(piece, name) for piece in pieces]) for name in ("codes", "scale", "zero_point")
    )
    return QuantizedTensor(codes, scale, zero, pieces[0].grid, pieces[0].dtype)
