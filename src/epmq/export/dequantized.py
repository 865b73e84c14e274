"""Plain safetensors with dequantized weights: for anything that reads a Hugging Face directory."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from epmq.export.form import Form
from epmq.models.checkpoint import DTYPE_NAMES, TensorSpec
from epmq.quantization.grid import QuantizedTensor


def specs(layer: str, shape: tuple[int, int], form: Form) -> dict[str, TensorSpec]:
    """One tensor; see `epmq.export.Format`."""
    return {f"{layer}.weight": (DTYPE_NAMES[form.dtype], shape[::-1] if form.transposed else shape)}


def tensors(layer: str, weight: QuantizedTensor, form: Form) -> dict[str, Tensor]:
    """The dequantized weight as its module stores it."""
    plain = weight.dequantize()
    return {f"{layer}.weight": plain.T if form.transposed else plain}


def weight(layer: str, read: Callable[[str], Tensor], form: Form) -> Tensor:
    """The weight [out, in], as stored."""
    plain = read(f"{layer}.weight")
    return plain.T if form.transposed else plain


def config(forms: Mapping[str, Form], ignore: list[str]) -> dict[str, Any] | None:
    """Nothing: the checkpoint is an ordinary one."""
    return None
