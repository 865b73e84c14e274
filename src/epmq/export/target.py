"""Formats of runtimes: files that are made of a finished checkpoint's codes, which are never rounded again.

To add one, write a module with the functions of `Target` and give it a line in `TARGETS`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from epmq.errors import InputError
from epmq.export.form import Form
from epmq.models.codes import CodedCheckpoint
from epmq.quantization.grid import Grid

# A layer of one of a mixture's experts: the mixture, within a block, and the expert's number.
_EXPERT = re.compile(r"(.+\.\d+\..+)\.(\d+)\.\w+")


@dataclass(frozen=True)
class Coded:
    """A quantized weight, as it is known before anything is computed.

    Attributes:
        shape: [out, in].
        form: how it is stored.
        half: float16 holds its scales exactly, as far as is known.
    """

    shape: tuple[int, int]
    form: Form
    half: bool = False

    @property
    def grid(self) -> Grid:
        """On which its codes lie."""
        return self.form.grid


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, or will hold: all that a target has to know to say whether it can hold it, too.

    Attributes:
        config: content of its `config.json`.
        layers: name on disk of a quantized layer or table → its weight.
        plain: name on disk → shape of every other tensor.
        processor: its tokenizer or processor, if it has one.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Coded]
    plain: Mapping[str, tuple[int, ...]]
    processor: Any = None


# What a verification has found, as it goes into reports: the runtime with its version, the number of examples, and
# how far its outputs are from those of `epmq.load`.
Verified = dict[str, Any]


class Target(Protocol):
    """What the module of a target has."""

    TITLE: str  # for whom it is, in a few words
    PACKAGES: tuple[str, ...]  # modules that writing needs
    EXTRA: str | None  # the extra that brings them
    RUNTIME: str | None  # module of the runtime that an output is verified in, if any

    def check(self, contents: Contents) -> None:
        """Refuse what the runtime cannot hold, before any compute.

        Raises:
            InputError: the layer is named, and the nearest grid that fits.
        """

    def write(self, source: CodedCheckpoint, folder: Path) -> list[Path]:
        """Write the files of the target into a folder, where the checkpoint's other files lie, or will lie.

        Returns:
            the files that hold weights.
        """

    def verify(self, folder: Path, source: Path, examples: Sequence[dict[str, Any]]) -> Verified:
        """Open what was written in the runtime, and hold its outputs against those of `epmq.load`.

        Args:
            folder: with the files of the target.
            source: the finished checkpoint.
            examples: inputs of the model, batch by batch.

        Raises:
            RuntimeError: they differ by more than the runtime's own rounding explains.
        """


# Target → its module.
TARGETS = {
    "onnx": "epmq.export.onnx",
    "onnx-int8": "epmq.export.onnx_int8",
    "gguf": "epmq.export.gguf",
    "gptq": "epmq.export.gptq",
    "vllm": "epmq.export.vllm",
}
# Those of which nothing is written: their runtimes open the checkpoint as it is, or `check` says why not.
AS_IT_IS = ("vllm",)


def find_target(name: str) -> Target:
    """The module of a target.

    Raises:
        InputError: there is none of that name, or a package that it needs is not installed.
    """
    if name not in TARGETS:
        raise InputError(f"{name!r} is not one of {', '.join(TARGETS)}")
    target = cast(Target, import_module(TARGETS[name]))
    missing = [package for package in target.PACKAGES if find_spec(package) is None]
    if missing:
        raise InputError(f"{name} needs {', '.join(missing)}: pip install 'epmq[{target.EXTRA}]'")
    return target


def has_runtime(target: Target) -> bool:
    """Whether what is written can be verified here."""
    return target.RUNTIME is not None and find_spec(target.RUNTIME) is not None


def experts_of(contents: Contents) -> dict[str, list[str]]:
    """The layers of experts by the mixtures that they are of, as their names on disk tell: `…experts.3.up_proj`."""
    plain = [name.removesuffix(".weight") for name, shape in contents.plain.items() if len(shape) == 2]
    found: dict[str, dict[str, list[str]]] = {}
    for name in (*contents.layers, *plain):
        if expert := _EXPERT.fullmatch(name):
            found.setdefault(expert[1], {}).setdefault(expert[2], []).append(name)
    return {  # of several experts, all of which have the same layers
        mixture: [name for parts in own.values() for name in parts]
        for mixture, own in found.items()
        if len(own) > 1 and len({frozenset(name.rpartition(".")[2] for name in parts) for parts in own.values()}) == 1
    }


def refuse_grid(runtime: str, layer: str, grid: Grid, nearest: str | Grid) -> InputError:
    """The error about a layer whose grid a runtime cannot hold; `nearest` fits, as a grid or in words."""
    fits = _settings(nearest) if isinstance(nearest, Grid) else nearest
    return InputError(f"{runtime} cannot hold {layer} on a grid of {_settings(grid)}; the nearest that fits: {fits}")


def _settings(grid: Grid) -> str:
    return f"bits: {grid.bits}, group_size: {grid.group_size}, symmetric: {str(grid.symmetric).lower()}"
