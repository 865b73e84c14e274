"""Plain safetensors with dequantized weights: for anything that reads a Hugging Face directory."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from epmq.models.checkpoint import TensorSpec
from epmq.quantization.grid import Grid, QuantizedTensor

HOLDS_TRANSPOSED = True


def specs(layer: str, shape: tuple[int, int], grid: Grid, dtype: str, transposed: bool) -> dict[str, TensorSpec]:
    """One tensor; see `epmq.export.Format`."""
    return {f"{layer}.weight": (dtype, shape[::-1] if transposed else shape)}


def tensors(layer: str, weight: QuantizedTensor, transposed: bool) -> dict[str, Tensor]:
    """The dequantized weight as its module stores it."""
    plain = weight.dequantize()
    return {f"{layer}.weight": plain.T if transposed else plain}


def weight(layer: str, read: Callable[[str], Tensor], grid: Grid, transposed: bool) -> Tensor:
    """The weight [out, in], as stored."""
    plain = read(f"{layer}.weight")
    return plain.T if transposed else plain


def config(grids: Mapping[str, Grid], ignore: list[str]) -> dict[str, Any] | None:
    """Nothing: the checkpoint is an ordinary one."""
    return None
