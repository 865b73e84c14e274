"""The settings of every method of quantizing: a class each, with defaults and descriptions.

To add a method, write such a class, add it to `Quantize` below, and write its function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from epmq.errors import InputError
from epmq.merge_settings import by_default
from epmq.storage_settings import PLAIN, StorageSettings


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
    own_inputs: bool = False  # whether moments are of the experts' own inputs, in the place of the merged model's
    biases: bool = True  # whether targets hold the experts' biases
    off_diagonal: float = 1.0  # factor on what lies off the diagonal of Gram matrices

    @property
    def runs_experts(self) -> bool:
        """Whether the experts run beside the merged model."""
        return bool(self.features or self.stream or self.refit_heads or self.own_inputs)


class QuantizeSettings(StorageSettings):
    """What all quantizers have in common."""

    calibrates: ClassVar[bool] = False  # whether it looks at calibration data
    guided: ClassVar[bool] = False  # whether the experts set the targets
    refines: ClassVar[bool] = False  # whether the quantized model may be trained towards the experts

    act_order: bool = Field(True, description="take columns by falling Hessian diagonal (static groups)")
    scales: Literal["search", "minmax"] = Field(
        "search", description="least squared error among shrunken ranges, or the plain range of the weights"
    )

    @property
    def own_samples(self) -> int | None:
        """Examples a task of what follows on the calibration, where it has some of its own."""
        return None

    def guidance(self) -> Guidance:
        """What calibration does; of no use where nothing is calibrated."""
        return Guidance()

    def defaults(self, heads: bool, far_anchor: float | None = None) -> dict[str, Any]:
        """What settings that are left out are, by whether all experts have a head, and the merge's `far_anchor`."""
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


def _written_off(value: Any) -> Any:
    """YAML takes `off` for a truth value."""
    return "off" if value is False else value


class RefinedSettings(QuantizeSettings):
    """What quantizers have in common whose model can be trained towards the experts when its codes are chosen."""

    calibrates: ClassVar[bool] = True
    refines: ClassVar[bool] = True

    refine: Annotated[Literal["off", "distill"], BeforeValidator(_written_off)] = Field(
        "off",
        description="distill: train scales, norms, biases and heads towards what each expert says to its calibration "
        "examples; codes stay. An eighth of the examples decides how much of it is kept",
    )
    refine_samples: int | None = Field(
        None,
        gt=0,
        description="examples a task for refine, which needs no labels and learns more from more; by default "
        "those of the calibration",
    )
    refine_epochs: int = Field(5, gt=0, description="how often refine goes through the examples at most")
    refine_learning_rate: float = Field(3e-4, gt=0, description="step of refine (Adam)")

    @property
    def own_samples(self) -> int | None:
        return None if self.refine == "off" else self.refine_samples


class Gptq(RefinedSettings):
    """GPTQ on the merged model."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, over its mean")
    adapt_heads: bool = Field(
        False, description="fit the last linear layer of each task's head to the new model's features"
    )

    def guidance(self) -> Guidance:
        return Guidance(refit_heads=self.adapt_heads, damping=self.damping)


class Guided(RefinedSettings):
    """What quantizers have in common whose targets the experts set."""

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
        description="the anchor lies at base + this × (merged − base); by default 3 (of wudi, tsv_m and iso 1.8) where "
        "all experts have heads that follow, else 1",
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

    def defaults(self, heads: bool, far_anchor: float | None = None) -> dict[str, Any]:
        follow = heads and self.adapt_heads
        return BY_HEADS[follow] | ({"anchor_scale": far_anchor} if follow and far_anchor is not None else {})

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


# The registry: a method is its class here, and its function.
Quantize = Annotated[
    Unquantized | RoundToNearest | Gptq | EPmq | ExpertGuided,
    Field(discriminator="method"),
    by_default("expert_guided"),
]


def quantize_settings(**fields: Any) -> Quantize:
    """The settings of a quantizer by plain values; pydantic.ValidationError if a field is not what it should be."""
    adapter: TypeAdapter[Quantize] = TypeAdapter(Quantize)
    return adapter.validate_python(fields)
