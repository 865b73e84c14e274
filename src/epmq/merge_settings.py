"""The settings of every method of merging: a class each, with defaults and descriptions.

To add a method, write such a class, add it to `Merge` below, and write its function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, field_validator, model_validator

from epmq.errors import InputError
from epmq.storage_settings import Strict

Scaling = float | list[float]


def _not_negative(value: list[float]) -> list[float]:
    if min(value, default=0) < 0 or sum(value) <= 0:
        raise InputError("must not be negative, nor all zero")
    return value


Weights = Annotated[list[float], AfterValidator(_not_negative)]


class MergeSettings(Strict):
    """What all merge methods have in common; their functions are in `epmq.merging.methods`."""

    calibrates: ClassVar[bool] = False  # whether it looks at calibration data
    # Where the strong anchor of expert_guided lies by default, over the merged task vector; None leaves it to that.
    far_anchor: ClassVar[float | None] = None

    method: str

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the method's function."""
        return self.model_dump(exclude={"method", "trim"})

    def check_experts(self, count: int) -> None:
        """Refuse a number of experts that cannot be merged so, with an InputError."""

    def reordered(self, order: Sequence[int]) -> MergeSettings:
        """The same for experts in another order; expert k was the one numbered `order[k]`."""
        lists = {name: [value[k] for k in order] for name, value in self if isinstance(value, list)}
        return self.model_copy(update=lists)


class MatrixSettings(MergeSettings):
    """What methods have in common that see the weight of a linear layer as a matrix.

    All other tensors get the mean of the task vectors.
    """

    far_anchor: ClassVar[float | None] = 1.8  # they take most of the sum of the task vectors themselves

    scaling: float = Field(1.0, description="factor on the merged task vector")

    def arguments(self) -> dict[str, Any]:
        return {"scaling": self.scaling}

    def matrix_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the function that merges a linear layer's weight."""
        return self.model_dump(exclude={"method", "scaling"})


class Average(MergeSettings):
    """The weighted mean of the experts; the base plays no part."""

    method: Literal["average"] = "average"
    weights: Weights | None = Field(None, description="weight of each expert; equal if left out")


class Regression(MergeSettings):
    """What methods have in common that fit linear layers to the experts' outputs; all else is the experts' mean."""

    calibrates: ClassVar[bool] = True
    own_inputs: ClassVar[bool]  # whether an expert's outputs are on its own inputs

    off_diagonal: float = Field(0.9, ge=0, le=1, description="factor on what lies off the diagonal of Gram matrices")

    def arguments(self) -> dict[str, Any]:
        return {}


class RegMean(Regression):
    """Layers give on each expert's inputs what the expert gives; needs calibration data."""

    own_inputs: ClassVar[bool] = True

    method: Literal["regmean"] = "regmean"


class RegMeanPlusPlus(Regression):
    """As regmean, on the inputs that the merged layers before give, block by block."""

    own_inputs: ClassVar[bool] = False

    method: Literal["regmean_pp"] = "regmean_pp"


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


class DropSettings(MergeSettings):
    """What methods have in common that drop entries of the task vectors, and then combine what is left."""

    scaling: Scaling = Field(0.3, description="factor on the task vectors, or a list with one an expert")
    combine: Literal["task_arithmetic", "ties", "ties_sum"] = Field(
        "task_arithmetic", description="what follows the drop; ties_sum adds up what has the elected sign"
    )

    @model_validator(mode="after")
    def _one_number(self) -> DropSettings:
        if self.combine != "task_arithmetic" and isinstance(self.scaling, list):
            raise InputError(f"scaling: {self.method} with combine: {self.combine} takes one number, not one an expert")
        return self


class Dare(DropSettings):
    """Drop entries of the task vectors at random, and rescale the others."""

    method: Literal["dare"] = "dare"
    density: float = Field(0.5, gt=0, le=1, description="share that is kept")


class Consensus(MergeSettings):
    """The scaled sum of the task vectors, where enough tasks use an entry (Consensus Task Arithmetic)."""

    method: Literal["consensus"] = "consensus"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    threshold: float = Field(
        0.4, ge=0, description="a task uses an entry that is at least so many times what the others add to it"
    )
    agreement: int = Field(2, ge=1, description="how many tasks must use an entry that is kept")

    def check_experts(self, count: int) -> None:
        if self.agreement > count:
            raise InputError(f"merge.agreement: {self.agreement} tasks, but the experts are {count}")


class Breadcrumbs(DropSettings):
    """Drop the smallest and the largest entries of the task vectors, tensor by tensor."""

    method: Literal["breadcrumbs"] = "breadcrumbs"
    smallest: float = Field(0.85, ge=0, lt=1, description="share that is dropped for being small")
    largest: float = Field(0.007, ge=0, lt=1, description="share that is dropped for being large")

    @model_validator(mode="after")
    def _something_is_left(self) -> Breadcrumbs:
        if self.smallest + self.largest >= 1:
            raise InputError(f"smallest, largest: {self.smallest} and {self.largest} leave nothing")
        return self


class Della(DropSettings):
    """Drop entries at random, small ones of a row more often, rescale, elect a sign, take the mean of what agrees."""

    method: Literal["della"] = "della"
    scaling: Scaling = Field(1.0, description="factor on the merged task vector; a list only with task_arithmetic")
    density: float = Field(0.5, gt=0, le=1, description="mean share that is kept")
    window: float = Field(0.3, ge=0, lt=1, description="between the smallest's and the largest's chance to be kept")
    combine: Literal["task_arithmetic", "ties", "ties_sum"] = Field(
        "ties", description="what follows the drop; ties_sum adds up what has the elected sign"
    )

    @model_validator(mode="after")
    def _chances(self) -> Della:
        low, high = self.density - self.window / 2, self.density + self.window / 2
        if low <= 0 or high > 1:
            raise InputError(
                f"window: entries would be kept with chances of {low:g} to {high:g} (density ± window/2), not 0 to 1"
            )
        return self


class ModelStock(MergeSettings):
    """Between the base and the mean of the experts, tensor by tensor: nearer to the mean, the more they agree."""

    method: Literal["model_stock"] = "model_stock"

    def check_experts(self, count: int) -> None:
        if count < 2:
            raise InputError(f"merge.method: model_stock merges two experts or more, not {count}")


class Slerp(MergeSettings):
    """Between two experts on an arc (spherical linear interpolation); the base plays no part."""

    method: Literal["slerp"] = "slerp"
    t: float = Field(0.5, ge=0, le=1, description="0 is the first expert, 1 the second")

    def check_experts(self, count: int) -> None:
        if count != 2:
            raise InputError(f"merge.method: slerp merges two experts, not {count}")

    def reordered(self, order: Sequence[int]) -> MergeSettings:
        # Rounded, so that 0.7 turned twice is 0.7.
        return self if list(order) == [0, 1] else self.model_copy(update={"t": round(1 - self.t, 12)})


class Karcher(MergeSettings):
    """The mean of the experts on a sphere (Karcher mean); the base plays no part."""

    method: Literal["karcher"] = "karcher"
    weights: Weights | None = Field(None, description="weight of each expert; equal if left out")
    steps: int = Field(10, ge=0, description="at most so many; 0 takes the direction of the mean of unit vectors")


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


# Names that mergekit and FusionBench have for methods → the method here, and the settings that make it the same.
ALIASES: dict[str, dict[str, Any]] = {
    # mergekit
    "linear": {"method": "average"},
    "dare_linear": {"method": "dare", "combine": "task_arithmetic"},
    "dare_ties": {"method": "dare", "combine": "ties_sum"},
    "breadcrumbs_ties": {"method": "breadcrumbs", "combine": "ties_sum"},
    "della_linear": {"method": "della", "combine": "task_arithmetic", "scaling": 0.3},
    "multislerp": {"method": "karcher", "steps": 0},
    # FusionBench
    "simple_average": {"method": "average"},
    "weighted_average": {"method": "average"},
    "ties_merging": {"method": "ties", "agreed": "sum", "scaling": 0.3},
    "task_singular_vector": {"method": "tsv_m"},
    "TaskSingularVectorMerging": {"method": "tsv_m"},
    "TSVM": {"method": "tsv_m"},
    "isotropic_merging/iso_c": {"method": "iso_c"},
    "isotropic_merging/iso_cts": {"method": "iso_cts"},
    "ISO_C_Merge": {"method": "iso_c"},
    "ISO_CTS_Merge": {"method": "iso_cts"},
    "regmean_plusplus": {"method": "regmean_pp"},
    "wudi_merging": {"method": "wudi", "iterative": True},
}


def by_default(method: str, aliases: Mapping[str, Mapping[str, Any]] | None = None) -> BeforeValidator:
    """Settings that name no method are of this one; those of an alias are its method's, under what was set."""

    def named(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        name = value.get("method", method)
        implied = (aliases or {}).get(name) if isinstance(name, str) else None
        return {"method": name, **value} if implied is None else {**implied, **value, "method": implied["method"]}

    return BeforeValidator(named)


# The registry: a method is its class here, and its functions in `epmq.merging.methods`.
Merge = Annotated[
    Average
    | TaskArithmetic
    | Ties
    | Dare
    | Consensus
    | Breadcrumbs
    | Della
    | ModelStock
    | Slerp
    | Karcher
    | Wudi
    | TsvM
    | IsoC
    | IsoCts
    | RegMean
    | RegMeanPlusPlus,
    Field(discriminator="method"),
    by_default("task_arithmetic", ALIASES),
]


def settings_classes(union: Any) -> dict[str, type[BaseModel]]:
    """Method → class of its settings, of `Merge` or `Quantize`."""
    return {one.model_fields["method"].default: one for one in get_args(get_args(union)[0])}
