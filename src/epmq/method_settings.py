"""The settings of every method of merging and of quantizing: a class each, with defaults and descriptions.

To add a method, write such a class, add it to `Merge` or `Quantize` below, and write its function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, field_validator, model_validator

from epmq.errors import InputError
from epmq.storage_settings import PLAIN, StorageSettings, Strict

Scaling = float | list[float]


class MergeSettings(Strict):
    """What all merge methods have in common; the function of the same name is in `epmq.merging.methods`."""

    method: str

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the method's function."""
        return self.model_dump(exclude={"method", "trim"})


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


@dataclass(frozen=True)
class Guidance:
    """What calibration makes of the experts, and how codes are chosen; the default is plain GPTQ."""

    experts: bool = False  # whether the experts set the targets
    ridge: float | None = None  # λ̄ of the target, over the mean Hessian diagonal
    anchor_scale: float = 1.0  # ρ, the anchor lies at base + ρ (merged − base)
    features: float = 0.0  # α, the share of the expert's own layer inputs in the targets
    stream: bool = False  # whether layers that write to the residual stream aim at the expert's own
    refit_heads: bool = False  # whether each task's head is fitted to the new model's features
    damping: float | None = None  # added to H's diagonal when codes are chosen, over its mean; None takes the ridge

    @property
    def runs_experts(self) -> bool:
        """Whether the experts run beside the merged model."""
        return bool(self.features or self.stream or self.refit_heads)


class QuantizeSettings(StorageSettings):
    """What all quantizers have in common."""

    calibrates: ClassVar[bool] = False  # whether it looks at calibration data
    guided: ClassVar[bool] = False  # whether the experts set the targets

    act_order: bool = Field(True, description="take columns by falling Hessian diagonal (static groups)")
    scales: Literal["search", "minmax"] = Field(
        "search", description="least squared error among shrunken ranges, or the plain range of the weights"
    )

    def guidance(self) -> Guidance:
        """What calibration does; of no use where nothing is calibrated."""
        return Guidance()

    def defaults(self, heads: bool) -> dict[str, Any]:
        """What settings that are left out are, by whether all experts have a head."""
        return {}


class Unquantized(QuantizeSettings):
    """The merge in full precision."""

    method: Literal["none"] = "none"


class RoundToNearest(QuantizeSettings):
    """Each weight to the nearest level; no calibration data."""

    method: Literal["rtn"] = "rtn"

    @model_validator(mode="after")
    def _rounds(self) -> RoundToNearest:
        if self.bits == PLAIN:
            raise InputError(f"bits: {PLAIN} rounds nothing: use method: none")
        return self


class Gptq(QuantizeSettings):
    """GPTQ on the merged model."""

    calibrates: ClassVar[bool] = True

    method: Literal["gptq"] = "gptq"
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, over its mean")
    adapt_heads: bool = Field(
        False, description="fit the last linear layer of each task's head to the new model's features"
    )

    def guidance(self) -> Guidance:
        return Guidance(refit_heads=self.adapt_heads, damping=self.damping)


class Guided(QuantizeSettings):
    """What quantizers have in common whose targets the experts set."""

    calibrates: ClassVar[bool] = True
    guided: ClassVar[bool] = True

    task_weights: dict[str, float] | None = Field(None, description="weight of each task; equal if left out")


class EPmq(Guided):
    """E-PMQ, the paper's form (arXiv 2605.16882)."""

    method: Literal["e_pmq"] = "e_pmq"
    anchor_strength: float = Field(0.03, gt=0, description="pull towards the anchor, over the mean Hessian diagonal")

    def guidance(self) -> Guidance:
        return Guidance(experts=True, ridge=self.anchor_strength)


# What expert_guided takes by whether all experts have heads that follow the model, chosen by
# `python -m benchmarks.choose`: heads take up what a strong anchor far along the task vectors leaves undone.
BY_HEADS: dict[bool, dict[str, Any]] = {
    True: {"anchor_strength": 30.0, "anchor_scale": 3.0, "expert_features": 0.0, "expert_stream": True},
    False: {"anchor_strength": 0.03, "anchor_scale": 1.0, "expert_features": 0.6, "expert_stream": True},
}


class ExpertGuided(Guided):
    """Ours: the paper's form with targets from the experts' own stream, a far anchor, and heads that follow."""

    method: Literal["expert_guided"] = "expert_guided"
    # A strong anchor belongs to the regression; codes are chosen with no more of it than the paper's form has.
    damping: float = Field(
        0.03, gt=0, description="added to the Hessian's diagonal when codes are chosen, over its mean"
    )
    anchor_strength: float | None = Field(
        None,
        gt=0,
        description="pull towards the anchor, over the mean Hessian diagonal; by default 30 where all experts have "
        "heads that follow, else 0.03",
    )
    anchor_scale: float | None = Field(
        None,
        gt=0,
        description="the anchor lies at base + this × (merged − base); by default 3 where all experts have heads that "
        "follow, else 1",
    )
    expert_features: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the expert's own layer inputs in the targets; by default 0 where all experts have heads "
        "that follow, else 0.6",
    )
    expert_stream: bool | None = Field(
        None, description="layers that add to the residual stream aim at the expert's own stream; by default they do"
    )
    adapt_heads: bool = Field(
        True,
        description="fit the last linear layer of each task's head so that it gives the expert's scores on the new "
        "model's features",
    )

    def defaults(self, heads: bool) -> dict[str, Any]:
        return BY_HEADS[heads and self.adapt_heads]

    def guidance(self) -> Guidance:
        return Guidance(
            experts=True,
            ridge=self.anchor_strength,
            anchor_scale=self.anchor_scale or 1.0,
            features=self.expert_features or 0.0,
            stream=bool(self.expert_stream),
            refit_heads=self.adapt_heads,
            damping=self.damping,
        )


def _by_default(method: str) -> BeforeValidator:
    """Settings that name no method are of this one."""
    return BeforeValidator(lambda value: {"method": method, **value} if isinstance(value, Mapping) else value)


# The registry: a method is its class in one of these two lines, and its function.
Merge = Annotated[Average | TaskArithmetic | Ties | Dare, Field(discriminator="method"), _by_default("task_arithmetic")]
Quantize = Annotated[
    Unquantized | RoundToNearest | Gptq | EPmq | ExpertGuided,
    Field(discriminator="method"),
    _by_default("expert_guided"),
]


def settings_classes(union: Any) -> dict[str, type[BaseModel]]:
    """Method → class of its settings, of `Merge` or `Quantize`."""
    return {one.model_fields["method"].default: one for one in get_args(get_args(union)[0])}


def quantize_settings(**fields: Any) -> Quantize:
    """The settings of a quantizer by plain values; pydantic.ValidationError if a field is not what it should be."""
    adapter: TypeAdapter[Quantize] = TypeAdapter(Quantize)
    return adapter.validate_python(fields)
