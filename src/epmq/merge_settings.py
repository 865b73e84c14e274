"""The settings of every method of merging: a class each, with defaults and descriptions.

To add a method, write such a class, add it to `Merge` below, and write its function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from epmq.errors import InputError
from epmq.storage_settings import Strict

Scaling = float | list[float]


class MergeSettings(Strict):
    """What all merge methods have in common; their functions are in `epmq.merging.methods`."""

    method: str

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the method's function."""
        return self.model_dump(exclude={"method", "trim"})


class MatrixSettings(MergeSettings):
    """What methods have in common that see the weight of a linear layer as a matrix.

    All other tensors get the mean of the task vectors.
    """

    scaling: float = Field(1.0, description="factor on the merged task vector")

    def arguments(self) -> dict[str, Any]:
        return {"scaling": self.scaling}

    def matrix_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the function that merges a linear layer's weight."""
        return self.model_dump(exclude={"method", "scaling"})


class Average(MergeSettings):
    """The weighted mean of the experts; the base plays no part."""

    method: Literal["average"] = "average"
    weights: list[float] | None = Field(None, description="weight of each expert; equal if left out")

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (min(value, default=0) < 0 or sum(value) <= 0):
            raise InputError("must not be negative, nor all zero")
        return value


class TaskArithmetic(MergeSettings):
    """Base and scaled sum of the task vectors."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: Scaling = Field(0.3, description="factor on the task vectors, or a list with one an expert")


class Ties(MergeSettings):
    """Trim the task vectors, elect a sign, take the mean of what agrees."""

    method: Literal["ties"] = "ties"
    scaling: float = Field(1.0, description="factor on the merged task vector")
    density: float = Field(0.2, gt=0, le=1, description="share that survives the trim")
    agreed: Literal["mean", "sum"] = Field(
        "mean", description="the mean of the entries that have the elected sign, or their sum"
    )
    trim: Literal["model", "tensor"] = Field("model", description="trim over the whole model or tensor by tensor")

    @field_validator("scaling", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise InputError("ties takes one number, not one an expert")
        return value


class Dare(MergeSettings):
    """Drop entries of the task vectors at random, and rescale the others."""

    method: Literal["dare"] = "dare"
    scaling: Scaling = Field(0.3, description="factor on the task vectors, or a list with one an expert")
    density: float = Field(0.5, gt=0, le=1, description="share that is kept")
    combine: Literal["task_arithmetic", "ties"] = Field("task_arithmetic", description="what follows the drop")

    @model_validator(mode="after")
    def _one_number(self) -> Dare:
        if self.combine == "ties" and isinstance(self.scaling, list):
            raise InputError("scaling: dare with combine: ties takes one number, not one an expert")
        return self


def by_default(method: str) -> BeforeValidator:
    """Settings that name no method are of this one."""
    return BeforeValidator(lambda value: {"method": method, **value} if isinstance(value, Mapping) else value)


class Wudi(MatrixSettings):
    """The task vector that interferes least with what each expert's layers read; in closed form."""

    method: Literal["wudi"] = "wudi"
    ridge: float = Field(0.1, gt=0, description="pull towards the sum of the task vectors")
    iterative: bool = Field(False, description="as published: 300 steps of Adam, without a ridge")


class TsvM(MatrixSettings):
    """The leading singular vectors of each task, made orthogonal to those of the others (TSV-Merge)."""

    method: Literal["tsv_m"] = "tsv_m"


class IsoC(MatrixSettings):
    """The sum of the task vectors with all singular values at their mean."""

    method: Literal["iso_c"] = "iso_c"


class IsoCts(MatrixSettings):
    """As iso_c, with a share of the space for directions of single tasks."""

    method: Literal["iso_cts"] = "iso_cts"
    common: float = Field(0.8, ge=0, le=1, description="share of the singular values that the sum of all keeps")


# The registry: a method is its class here, and its functions in `epmq.merging.methods`.
Merge = Annotated[
    Average | TaskArithmetic | Ties | Dare | Wudi | TsvM | IsoC | IsoCts,
    Field(discriminator="method"),
    by_default("task_arithmetic"),
]


def settings_classes(union: Any) -> dict[str, type[BaseModel]]:
    """Method → class of its settings, of `Merge` or `Quantize`."""
    return {one.model_fields["method"].default: one for one in get_args(get_args(union)[0])}
