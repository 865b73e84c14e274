"""Plain safetensors with dequantized weights: for anything that reads a Hugging Face directory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epmq.models.blocks import as_matrix
from epmq.quantization.grid import Grid, QuantizedTensor

NEEDS_LINEAR = False


def tensors(prefix: str, layer: nn.Module, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The layer's dequantized weight as its module stores it; arguments as in `epmq.export.packed`."""
    return {f"{prefix}.weight": as_matrix(layer, weight.dequantize())}


def stored_bytes(rows: int, columns: int, grid: Grid, dtype: torch.dtype) -> int:
    """Bytes of a layer's tensors; arguments as in `epmq.export.packed`."""
    return rows * columns * dtype.itemsize


def config(grid: Grid, ignore: list[str]) -> dict[str, Any] | None:
    """Nothing: the checkpoint is an ordinary one."""
    return None
