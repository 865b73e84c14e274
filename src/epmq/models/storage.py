"""How every tensor of an output is stored: on a grid, or plain in some dtype, or not at all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epmq.quantization.grid import Grid, QuantizedTensor, join_rows
from epmq.quantization.rtn import rtn


def join(module: str, name: str) -> str:
    """The full name of what is called `name` within a module; "" is the model itself."""
    return f"{module}.{name}" if module else name


@dataclass(frozen=True)
class Storage:
    """How one tensor is stored.

    Attributes:
        dtype: of a plain tensor, or in which a quantized one is read back; None for what is no float and stays as it
            is.
        grid: None where it is plain.
        scale: dtype of the scales; None where it is plain.
        solved: a linear layer's weight that gets a target; one that is plain holds it unrounded.
    """

    dtype: torch.dtype | None = None
    grid: Grid | None = None
    scale: torch.dtype | None = None
    solved: bool = False


@dataclass(frozen=True)
class Layout:
    """How the tensors of an output are stored.

    Attributes:
        of: tensor, by its name in the model → how it is stored; what is not written is not in it.
        late: linear layers outside the blocks that are solved after the last block, in the order of their calls.
        output_layer: that of a language model, by its name, where it is one of these.
        dropped: tensors that are left out.
        search: whether scales are searched.
        free: layers and tables whose grid is still to be chosen, with the grids that they may have, by rising bits.
    """

    of: Mapping[str, Storage] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    output_layer: str | None = None
    dropped: tuple[str, ...] = ()
    search: bool = True
    free: Mapping[str, tuple[Grid, ...]] = field(default_factory=dict)

    def grid(self, layer: str) -> Grid | None:
        """The grid of a layer's weight; None where it is plain."""
        return self.of[f"{layer}.weight"].grid

    def solves(self, layer: str) -> bool:
        """Whether a layer's weight gets a target."""
        storage = self.of.get(f"{layer}.weight")
        return storage is not None and storage.solved

    def with_grids(self, grids: Mapping[str, Grid]) -> "Layout":
        """The same with the grids that were chosen, by the names of the layers."""
        changed = {f"{layer}.weight": grid for layer, grid in grids.items()}
        of = {name: replace(one, grid=changed.get(name, one.grid)) for name, one in self.of.items()}
        return replace(self, of=of, free={})

    def quantized(self) -> dict[str, Grid]:
        """Layers and tables on a grid: name → grid."""
        return {name.removesuffix(".weight"): one.grid for name, one in self.of.items() if one.grid is not None}

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A plain tensor in the dtype in which it is stored; any other one as it is."""
        storage = self.of.get(name, Storage())
        if storage.dtype is None or storage.grid is not None or storage.solved:
            return tensor
        return tensor.to(storage.dtype)

    def round(self, name: str, parts: Iterable[Tensor]) -> QuantizedTensor:
        """A table or another matrix [out, in] rounded to nearest; it comes some rows at a time."""
        storage = self.of[name]
        assert storage.grid is not None and storage.scale is not None
        grid, scale = storage.grid, storage.scale
        rounded = join_rows(rtn(part, grid, search=self.search, scale_dtype=scale) for part in parts)
        return replace(rounded, dtype=storage.dtype)

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A merged tensor outside the blocks, as it is read back from the output: rounded to nearest, or cast."""
        if self.of.get(name, Storage()).grid is None or name.removesuffix(".weight") in self.late:
            return self.cast(name, tensor)
        return self.round(name, [tensor]).dequantize()
