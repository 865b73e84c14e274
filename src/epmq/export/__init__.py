"""Output formats: a stateless module each, which turns one quantized layer into named tensors.

To add a format, write a module with the functions of `Format` and give it a line in `FORMATS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from epmq.export import dequantized, packed
from epmq.models.checkpoint import TensorSpec
from epmq.quantization.grid import Grid, QuantizedTensor


class Format(Protocol):
    """What a format's module has. A layer that stores its weight as [in, out] is `transposed`."""

    HOLDS_TRANSPOSED: bool

    def specs(
        self, layer: str, shape: tuple[int, int], grid: Grid, dtype: str, transposed: bool
    ) -> dict[str, TensorSpec]:
        """Name → dtype and shape of the tensors that stand for a weight.

        The layer goes by its name on disk, `shape` is [out, in], and `dtype` is that of the scales, as safetensors
        calls it.
        """

    def tensors(self, layer: str, weight: QuantizedTensor, transposed: bool) -> dict[str, Tensor]:
        """The tensors that stand for a weight, by the names of `specs`."""

    def weight(self, layer: str, read: Callable[[str], Tensor], grid: Grid, transposed: bool) -> Tensor:
        """The plain weight [out, in] back from the tensors, as `QuantizedTensor.dequantize` gives it."""

    def config(self, grids: Mapping[str, Grid], ignore: list[str]) -> dict[str, Any] | None:
        """The `quantization_config` of `config.json`, if it needs one.

        `grids` are those of layers and tables, by their names; `ignore` names linear layers that are not quantized.
        """


FORMATS: dict[str, Format] = {"pack-quantized": cast(Format, packed), "dequantized": cast(Format, dequantized)}
