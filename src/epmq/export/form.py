"""What a format has to know of a quantized weight."""

import re
from dataclasses import dataclass

import torch

from epmq.models.checkpoint import DTYPE_NAMES
from epmq.quantization.grid import Grid


@dataclass(frozen=True)
class Form:
    """How a quantized weight is stored.

    Attributes:
        grid: on which it lies.
        dtype: in which it is read back.
        scale: dtype of its scales.
        transposed: the layer stores it as [in, out].
        table: it is looked up by rows.
        followers: names of other layers that have the same weight.
    """

    grid: Grid
    dtype: torch.dtype = torch.float32
    scale: torch.dtype = torch.float32
    transposed: bool = False
    table: bool = False
    followers: tuple[str, ...] = ()

    @property
    def scale_name(self) -> str:
        """The dtype of the scales, as safetensors calls it."""
        return DTYPE_NAMES[self.scale]


def in_block(layer: str) -> bool:
    """Whether a layer, by its name on disk, is in one of the numbered blocks of a model."""
    return re.search(r"\.\d+\.", layer) is not None
