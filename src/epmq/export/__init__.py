"""Output formats: a stateless module each, which turns one quantized weight into named tensors.

To add a format, write a module with the functions of `Format` and give it a line in `FORMATS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from epmq.export import dequantized, packed
from epmq.export.form import Form
from epmq.models.checkpoint import TensorSpec
from epmq.quantization.grid import QuantizedTensor


class Format(Protocol):
    """What a format's module has. Weights go by their layers' names on disk, and are [out, in]."""

    def specs(self, layer: str, shape: tuple[int, int], form: Form) -> dict[str, TensorSpec]:
        """Name → dtype and shape of the tensors that stand for a weight."""

    def tensors(self, layer: str, weight: QuantizedTensor, form: Form) -> dict[str, Tensor]:
        """The tensors that stand for a weight, by the names of `specs`."""

    def weight(self, layer: str, read: Callable[[str], Tensor], form: Form) -> Tensor:
        """The plain weight back from the tensors, as `QuantizedTensor.dequantize` gives it."""

    def config(self, forms: Mapping[str, Form], ignore: list[str]) -> dict[str, Any] | None:
        """The `quantization_config` of `config.json`, if it needs one.

        `forms` are those of all quantized weights, by the names of their layers; `ignore` names linear layers that are
        not quantized.
        """


FORMATS: dict[str, Format] = {"pack-quantized": cast(Format, packed), "dequantized": cast(Format, dequantized)}
