"""How the parts of a quantized model are stored: tables of tokens, output layer, single layers, and the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from epmq.errors import InputError
from epmq.quantization.grid import BITS, GROUP_SIZES, Grid

# The bits of a weight that is not rounded.
PLAIN = 16
REGEX = "re:"
SIZE = TypeAdapter(ByteSize)
Dtype = Literal["auto", "float16", "bfloat16", "float32", "as-stored"]


class Strict(BaseModel):
    """Plain data: unknown fields, infinite numbers and later changes are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _one_of(values: tuple[int, ...]) -> AfterValidator:
    """Lets a number pass that is one of some; another one is an InputError."""

    def check(value: int) -> int:
        if value not in values:
            raise InputError(f"{value} is not one of {', '.join(map(str, values))}")
        return value

    return AfterValidator(check)


Bits = Annotated[int, _one_of((*BITS, PLAIN))]
GroupSize = Annotated[int, _one_of(GROUP_SIZES)]


class PartGrid(Strict):
    """The grid of a table or of the output layer; what is left out is as in the blocks, groups by the bits."""

    bits: Bits = Field(description="2, 3, 4 or 8; 16 keeps it as it is merged")
    group_size: GroupSize | None = Field(
        None, description="weights that share a scale: -1 (a row), 32, 64 or 128; by default a row of 8 bits, else 32"
    )
    symmetric: bool | None = Field(None, description="without a zero point; by default as the blocks")

    def grid(self, symmetric: bool) -> Grid | None:
        """The grid; None where the weight is kept. `symmetric` is what the blocks are."""
        groups = self.group_size if self.group_size is not None else -1 if self.bits == 8 else 32
        own = symmetric if self.symmetric is None else self.symmetric
        return None if self.bits == PLAIN else Grid(self.bits, groups, own)


class Override(Strict):
    """Other settings for the layers whose name matches; what is left out is as it would be without."""

    layers: str = Field(description="names of layers: a glob such as '*.mlp.*', or a regular expression after 're:'")
    bits: Bits | None = Field(None, description="2, 3, 4 or 8; 16 gives the layer its target unrounded")
    group_size: GroupSize | None = Field(None, description="weights that share a scale: -1 (a row), 32, 64 or 128")
    symmetric: bool | None = Field(None, description="without a zero point")
    skip: bool = Field(False, description="leave the merged weight as it is")

    @field_validator("layers")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value.removeprefix(REGEX) if value.startswith(REGEX) else "")
        except re.error as error:
            raise InputError(f"{value!r} is not a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        others = [name for name in ("bits", "group_size", "symmetric") if getattr(self, name) is not None]
        if self.skip and others:
            raise InputError(f"skip: a layer that is skipped has no {', no '.join(others)}")
        if not self.skip and not others:
            raise InputError(f"{self.layers!r}: says neither bits, group_size, symmetric nor skip")
        if self.bits == PLAIN and len(others) > 1:
            raise InputError(f"bits: {PLAIN} has no groups and no zero points")
        return self

    def matches(self, name: str) -> bool:
        """Whether it is about the layer of that name."""
        if self.layers.startswith(REGEX):
            return re.fullmatch(self.layers.removeprefix(REGEX), name) is not None
        return fnmatchcase(name, self.layers)

    def grid(self, otherwise: Grid | None) -> Grid | None:
        """The grid of a layer that has another one without this; None where it is not rounded."""
        if self.skip or self.bits == PLAIN:
            return None
        start = otherwise or Grid()
        return Grid(
            start.bits if self.bits is None else self.bits,
            start.group_size if self.group_size is None else self.group_size,
            start.symmetric if self.symmetric is None else self.symmetric,
        )


def _from_bits(value: Any) -> Any:
    """A number alone is the bits."""
    return {"bits": value} if isinstance(value, int) and not isinstance(value, bool) else value


def parse_size(value: Any) -> Any:
    """Bytes from a number or a text such as 40MB or 1.5 GiB; a text that is none is an InputError."""
    try:
        return int(SIZE.validate_python(value)) if isinstance(value, str) else value
    except ValidationError:
        raise InputError(f"{value!r} is not a size such as 40MB") from None


Part = Annotated[PartGrid | None, BeforeValidator(_from_bits)]


def _preset(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """A grid for the layers of a GGUF file, whose tables are Q8_0."""
    table = PartGrid(bits=8, group_size=-1, symmetric=True)
    fields = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": "float16"}
    return {**fields, "embeddings": table, "output_layer": table}


# Settings that a grid stands for: those on which the blocks of that type in a GGUF file hold every weight exactly.
PRESETS = {
    "gguf-q2_k": _preset(2, -1, False),
    "gguf-q3_k": _preset(3, -1, True),
    "gguf-q4_0": _preset(4, 32, True),
    "gguf-q4_k": _preset(4, -1, False),
    "gguf-q5_0": _preset(4, 32, False),
    "gguf-q8_0": _preset(8, 32, True),
}


class StorageSettings(Strict):
    """What is stored how; `epmq.pipeline.layout` says what that makes of every tensor."""

    method: str
    grid: Literal["gguf-q2_k", "gguf-q3_k", "gguf-q4_0", "gguf-q4_k", "gguf-q5_0", "gguf-q8_0"] | None = Field(
        None,
        description="bits, group_size, symmetric, scale_dtype, embeddings and output_layer that blocks of a GGUF file "
        "hold exactly: gguf-q4_0, gguf-q8_0, gguf-q5_0 (4 bits, groups of 32, zero points), or a scale a row: "
        "gguf-q2_k, gguf-q3_k, gguf-q4_k (columns that 256 divides)",
    )
    bits: Bits = Field(4, description="2, 3, 4 or 8; 16 gives every layer its target unrounded, in the stored dtype")
    group_size: GroupSize = Field(-1, description="weights that share a scale: -1 (a row), 32, 64 or 128")
    symmetric: bool = Field(True, description="without a zero point")
    embeddings: Part = Field(
        None,
        description="bits of the tables with a row a token: 8, 4 (in groups of 32), …, 16 to keep them, or bits, "
        "group_size and symmetric; by default 8",
    )
    output_layer: Part = Field(
        None, description="the same of the output layer of a language model; what is tied to a table is that table"
    )
    rest: Dtype = Field(
        "auto",
        description="dtype of norms, biases, positions and all else that is not quantized: float16, bfloat16, float32, "
        "as-stored, or auto: float16 in the place of float32",
    )
    scale_dtype: Dtype = Field(
        "auto",
        description="dtype of the scales: float16, bfloat16, float32, as-stored (that of the weight), or auto: float16 "
        "in the place of float32",
    )
    overrides: list[Override] = Field(
        [],
        description="other settings for some layers, the first that matches: {layers: '*.mlp.*', bits: 8}, or with "
        "group_size, symmetric, or skip: true",
    )
    budget: float | None = Field(
        None, gt=0, description="bits a weight of the whole file, scales included: bits are chosen layer by layer"
    )
    size: Annotated[int | None, BeforeValidator(parse_size)] = Field(
        None, gt=0, description="the same as bytes of the file, such as 40MB"
    )
    drop_unused: bool = Field(False, description="leave out what no task's head reads, such as an unused pooler")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, value: Any) -> Any:
        """What a grid stands for, where it is left out."""
        grid = value.get("grid") if isinstance(value, Mapping) else None
        return {**PRESETS[grid], **value} if isinstance(grid, str) and grid in PRESETS else value

    @model_validator(mode="after")
    def _as_the_grid(self) -> StorageSettings:
        for name, value in PRESETS[self.grid].items() if self.grid is not None else ():
            if _meant(getattr(self, name), self.symmetric) != _meant(value, self.symmetric):
                raise InputError(f"{name}: another one than that of grid: {self.grid}: leave it out")
        if self.grid is not None and (self.budget is not None or self.size is not None):
            raise InputError("grid: a budget chooses the bits: only one of them")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> StorageSettings:
        if self.budget is not None and self.size is not None:
            raise InputError("budget, size: only one of them")
        if self.bits == PLAIN and (self.budget is not None or self.size is not None):
            raise InputError(f"bits: {PLAIN} rounds nothing, and a budget chooses the bits: only one of them")
        return self

    @property
    def block_grid(self) -> Grid | None:
        """The grid of a layer in the blocks; None where it is not rounded."""
        return None if self.bits == PLAIN else Grid(self.bits, self.group_size, self.symmetric)

    def part_grid(self, part: PartGrid | None) -> Grid | None:
        """The grid of a table or the output layer; None where it is kept."""
        if part is None:
            return None if self.bits == PLAIN else PartGrid(bits=8).grid(self.symmetric)
        return part.grid(self.symmetric)


def _meant(value: Any, symmetric: bool) -> Any:
    """A setting, or the grid that one of a part means."""
    return value.grid(symmetric) if isinstance(value, PartGrid) else value


# What every page tells of a quantizer, whatever it is.
ALWAYS_SHOWN = ("method", "bits", "group_size", "symmetric")


def without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a quantizer as plain values, without those on storage that are the defaults."""
    defaults = {name: field.default for name, field in StorageSettings.model_fields.items() if name not in ALWAYS_SHOWN}
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}


def describe(part: Mapping[str, Any] | None) -> str:
    """A grid of plain values in a few words: 4 bits, a row."""
    if not part:
        return "not quantized"
    groups = "a row" if part.get("group_size") in (-1, None) else f"g{part['group_size']}"
    return f"{part['bits']} bits, {groups}" + ("" if part.get("symmetric", True) else ", asymmetric")
