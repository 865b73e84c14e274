"""Matrices and biases that lie in a larger tensor on disk, such as one expert's in a fused tensor of a mixture."""

import re
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from epmq.errors import InputError

_NAME = re.compile(r"(.+)\[(\d*)/(\d*) (\d+)([:%])(\d+)(T?)(?:\?(\d+)x(\d+))?\]\.(\w+)")


@dataclass(frozen=True)
class Piece:
    """A part of a tensor on disk that is a tensor of the model.

    It has a name, which stands for it wherever a tensor is called by its name on disk.

    Attributes:
        tensor: name on disk of the whole.
        index: which entry of its first dimension, of so many (`count`); None where it is all of them.
        part: which of so many equal `parts` of the rows.
        interleaved: these are every so many rows; else they follow one another.
        turned: what lies there is [in, out].
        leaf: what the model calls it, `weight` or `bias`.
        unturned: shape of an entry that is not turned, where that is told by it: one of another shape is.
    """

    tensor: str
    index: int | None = None
    count: int | None = None
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    turned: bool = False
    leaf: str = "weight"
    unturned: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        which = "/" if self.index is None else f"{self.index}/{self.count}"
        rows = f"{self.part}{'%' if self.interleaved else ':'}{self.parts}{'T' if self.turned else ''}"
        shape = "" if self.unturned is None else f"?{self.unturned[0]}x{self.unturned[1]}"
        return f"{self.tensor}[{which} {rows}{shape}].{self.leaf}"

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape in a tensor of that shape.

        Raises:
            InputError: the tensor has another number of entries or dimensions, or its rows cannot be shared out.
        """
        own = whole if self.index is None else whole[1:]
        if self.count is not None and (not whole or whole[0] != self.count):
            raise InputError(f"tensor {self.tensor!r} is {list(whole)}, and its config says {self.count} experts")
        own = own[::-1] if self._is_turned(own) else own
        if len(own) != (2 if self.leaf == "weight" else 1) or own[0] % self.parts:
            raise InputError(f"tensor {self.tensor!r} is {list(whole)}, which is no {self.leaf} of {self.parts} parts")
        return own[0] // self.parts, *own[1:]

    def _is_turned(self, entry: tuple[int, ...]) -> bool:
        """Whether an entry of that shape is [in, out]."""
        return self.turned if self.unturned is None else tuple(entry) != self.unturned

    def take(self, entry: Tensor) -> Tensor:
        """It, of the entry of the whole that it lies in: a view."""
        own = entry.T if entry.ndim == 2 and self._is_turned(entry.shape) else entry
        if self.interleaved:
            return own[self.part :: self.parts]
        size = len(own) // self.parts
        return own[self.part * size : (self.part + 1) * size]


@lru_cache(maxsize=1 << 16)
def piece_of(name: str) -> Piece | None:
    """The piece that a name on disk stands for; None for the name of a tensor."""
    found = _NAME.fullmatch(name) if name.endswith(("].weight", "].bias")) else None
    if found is None:
        return None
    tensor, index, count, part, kind, parts, turned, rows, columns, leaf = found.groups()
    entry, entries = (int(index), int(count)) if index else (None, None)
    unturned = (int(rows), int(columns)) if rows else None
    return Piece(tensor, entry, entries, int(part), int(parts), kind == "%", bool(turned), leaf, unturned)


def tensor_on_disk(name: str) -> str:
    """The tensor on disk that a name is of, or a piece of."""
    piece = piece_of(name)
    return name if piece is None else piece.tensor
