"""The recipe: everything that a run needs to know, in one YAML file or one Python object."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from epmq.errors import InputError, MissingError
from epmq.files import parse_yaml
from epmq.quantization.grid import BITS, GROUP_SIZES, Grid

# What the two expert-guided methods take where the recipe does not say: e_pmq is the paper's form.
GUIDED: dict[str, dict[str, Any]] = {
    "e_pmq": {
        "anchor_strength": 0.03,
        "anchor_scale": 1.0,
        "expert_features": 0.0,
        "expert_stream": False,
        "adapt_heads": False,
    },
    "expert_guided": {
        "anchor_strength": None,
        "anchor_scale": None,
        "expert_features": None,
        "expert_stream": None,
        "adapt_heads": True,
    },
}
# What expert_guided takes by whether all experts have heads that follow the model, chosen by
# `python -m benchmarks.choose`: heads take up what a strong anchor far along the task vectors leaves undone.
BY_HEADS: dict[bool, dict[str, Any]] = {
    True: {
        "anchor_strength": 30.0,
        "anchor_scale": 3.0,
        "expert_features": 0.0,
        "expert_stream": True,
    },
    False: {
        "anchor_strength": 0.03,
        "anchor_scale": 1.0,
        "expert_features": 0.6,
        "expert_stream": True,
    },
}
# A strong anchor belongs to the regression; codes are chosen with no more of it than the paper's form has.
DAMPING = {"gptq": 0.01, "expert_guided": 0.03}
# The one piece of expert_guided that may be put on plain GPTQ, to see what it does alone.
HEADS_ALONE = ("gptq", "adapt_heads")
METHODS = ("none", "rtn", "gptq", *GUIDED)
GUIDED_DEFAULTS = "the default depends on the method"
ANCHOR_DEFAULTS = "expert_guided: by default {} where all experts have heads that follow, else as in e_pmq"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Strict):
    """Examples of one task: a file or folder (`path`), or something that the datasets library opens (`dataset`)."""

    path: str | None = Field(
        None, description="a .jsonl, .csv, .parquet or .npz file, or a folder of images, one folder a class"
    )
    dataset: str | None = Field(None, description="a name or folder for the datasets library (epmq[data])")
    subset: str | None = Field(None, description="configuration of the dataset")
    split: str | None = Field(None, description="split of the dataset; train if left out")
    samples: int | None = Field(None, gt=0, description="how many examples to draw; all if left out")
    text: str | list[str] = Field("text", description="name of the text column, or of two for pairs")
    target: str = Field("target", description="name of the target column, for encoder–decoders")
    label: str = Field("label", description="name of the label column (a class index)")
    image: str = Field("image", description="name of the image column (a path beside the file, or a picture)")
    messages: str = Field("messages", description="name of the column with chat messages")
    prompt: str | None = Field(
        None, description="a text made of columns, such as 'Is \"{sentence}\" good English?', in place of a text column"
    )
    answer: str | None = Field(
        None, description="a target made of columns, such as '{label:.1f}', in place of a target column"
    )
    answers: list[str] | None = Field(
        None, min_length=2, description="a target for each class index in the label column, in place of a target column"
    )
    metric: Literal["accuracy", "exact_match", "spearman", "log_perplexity"] | None = Field(
        None, description="how evaluation examples are scored; by default as their kind is"
    )
    pack: bool = Field(
        True, description="language models: put texts end to end and cut windows; if false, cut each text for itself"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.path is None) == (self.dataset is None):
            raise InputError("needs either a path or a dataset")
        for field in ("split", "subset"):
            if self.path is not None and getattr(self, field) is not None:
                raise InputError(f"{field}: only a dataset has one; a path is one split")
        if isinstance(self.text, list) and len(self.text) != 2:
            raise InputError("text: one column, or two for pairs")
        if self.answer is not None and self.answers is not None:
            raise InputError("answer, answers: only one of them")
        return self


class Expert(Strict):
    """One fine-tune of the base."""

    name: str = Field(pattern=r"^[\w.-]+$", description="name of its task")
    model: str = Field(
        description="directory or Hub id of a full checkpoint or a LoRA adapter; a pickle only by its file name"
    )
    head: str | None = Field(
        None, description="head file; by default head.safetensors beside the expert, if there is one"
    )
    calibration: Data | None = Field(None, description="unlabelled examples to calibrate on; never the test data")
    evaluation: Data | None = Field(None, description="labelled examples to evaluate on")


class Merge(Strict):
    """How the experts become one model."""

    method: Literal["average", "task_arithmetic", "ties", "dare"] = "task_arithmetic"
    scaling: float | list[float] | None = Field(
        None, description="factor on the task vectors, one or one an expert; 0.3, for ties 1.0"
    )
    weights: list[float] | None = Field(None, description="average: weight of each expert")
    density: float | None = Field(
        None, gt=0, le=1, description="ties: share that survives the trim (0.2); dare: share that is kept (0.5)"
    )
    agreed: Literal["mean", "sum"] = Field(
        "mean", description="ties: the mean of the entries that have the elected sign, or their sum"
    )
    trim: Literal["model", "tensor"] = Field("model", description="ties: trim over the whole model or tensor by tensor")
    combine: Literal["task_arithmetic", "ties"] = Field("task_arithmetic", description="dare: what follows the drop")

    @model_validator(mode="after")
    def _fits(self) -> Merge:
        if self.method == "ties" and isinstance(self.scaling, list):
            raise InputError("scaling: ties takes one number, not one an expert")
        if self.method == "dare" and self.combine == "ties" and isinstance(self.scaling, list):
            raise InputError("scaling: dare with combine: ties takes one number, not one an expert")
        if self.weights is not None and (min(self.weights, default=0) < 0 or sum(self.weights) <= 0):
            raise InputError("weights: must not be negative, nor all zero")
        unused = {
            "scaling": self.scaling is not None and self.method == "average",
            "weights": self.weights is not None and self.method != "average",
            "density": self.density is not None and self.method not in ("ties", "dare"),
            "agreed": self.agreed != "mean" and self.method != "ties",
        }
        for field, wrong in unused.items():
            if wrong:
                raise InputError(f"{field}: {self.method} does not use it")
        return self

    def settings(self) -> dict[str, Any]:
        """Keyword arguments for the function in `epmq.merging.methods.METHODS` (without thresholds, name and seed)."""
        if self.method == "average":
            return {"weights": self.weights}
        default = 1.0 if self.method == "ties" else 0.3
        settings: dict[str, Any] = {"scaling": default if self.scaling is None else self.scaling}
        if self.method == "ties":
            settings |= {"density": self.density or 0.2, "agreed": self.agreed}
        if self.method == "dare":
            settings |= {"density": self.density or 0.5, "combine": self.combine}
        return settings


class Quantize(Strict):
    """How the merged model becomes a low-bit one."""

    method: Literal["none", "rtn", "gptq", "e_pmq", "expert_guided"] = Field(
        "expert_guided", description="e_pmq is the paper's form, expert_guided ours"
    )
    bits: int = Field(4, description="2, 3, 4 or 8")
    group_size: int = Field(-1, description="weights that share a scale: -1 (a row), 32, 64 or 128")
    symmetric: bool = Field(True, description="without a zero point")
    act_order: bool = Field(True, description="take columns by falling Hessian diagonal (static groups)")
    scales: Literal["search", "minmax"] = Field(
        "search", description="least squared error among shrunken ranges, or the plain range of the weights"
    )
    damping: float | None = Field(
        None,
        gt=0,
        description="gptq, expert_guided: added to the Hessian's diagonal when codes are chosen, over its mean; by "
        "default 0.01 and 0.03",
    )
    anchor_strength: float | None = Field(
        None, gt=0, description=f"pull towards the anchor, over the mean Hessian diagonal; {ANCHOR_DEFAULTS.format(30)}"
    )
    anchor_scale: float | None = Field(
        None, gt=0, description=f"the anchor lies at base + this × (merged − base); {ANCHOR_DEFAULTS.format(3)}"
    )
    expert_features: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the expert's own layer inputs in the targets; expert_guided: by default 0 where all "
        "experts have heads that follow, else 0.6",
    )
    expert_stream: bool | None = Field(
        None,
        description="layers that add to the residual stream aim at the expert's own stream; expert_guided: by default",
    )
    adapt_heads: bool | None = Field(
        None,
        description="fit the last linear layer of each task's head so that it gives the expert's scores on the new "
        f"model's features; {GUIDED_DEFAULTS}",
    )
    task_weights: dict[str, float] | None = Field(
        None, description="expert_guided: weight of each task; equal if left out"
    )

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: int) -> int:
        if value not in BITS:
            raise InputError(f"{value} is not one of {', '.join(map(str, BITS))}")
        return value

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            raise InputError(f"{value} is not one of {', '.join(map(str, GROUP_SIZES))}")
        return value

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    @model_validator(mode="after")
    def _guided(self) -> Quantize:
        """Fill in the method's own defaults, and refuse settings that it does not use."""
        defaults = GUIDED.get(self.method)
        for field in GUIDED["e_pmq"]:
            if defaults is None and getattr(self, field) is not None and (self.method, field) != HEADS_ALONE:
                raise InputError(f"{field}: {self.method} does not use it")
            if defaults is not None and getattr(self, field) is None:
                object.__setattr__(self, field, defaults[field])
        if self.damping is None:
            object.__setattr__(self, "damping", DAMPING.get(self.method))
        elif self.method not in DAMPING:
            raise InputError(f"damping: {self.method} does not use it")
        if self.method == "e_pmq":
            for field in ("anchor_scale", "expert_features", "expert_stream", "adapt_heads"):
                if getattr(self, field) != GUIDED["e_pmq"][field]:
                    raise InputError(f"{field}: e_pmq, the paper's form, has none; take expert_guided")
        return self

    def resolved(self, heads: bool) -> Quantize:
        """The same with everything that depends on heads filled in.

        Args:
            heads: whether all experts have a head.
        """
        if self.method != "expert_guided":
            return self
        defaults = BY_HEADS[heads and bool(self.adapt_heads)]
        found = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=found)

    @property
    def guided(self) -> bool:
        """Whether the experts set the targets."""
        return self.method in GUIDED

    @property
    def calibrates(self) -> bool:
        return self.guided or self.method == "gptq"


class Recipe(Strict):
    """One run: K experts in, one checkpoint out."""

    base: str = Field(description="the model that all experts were fine-tuned from: Hugging Face directory or Hub id")
    experts: list[Expert] = Field(min_length=1)
    merge: Merge = Merge()
    quantize: Quantize = Quantize()
    format: Literal["pack-quantized", "dequantized"] = Field(
        "pack-quantized", description="pack-quantized (compressed-tensors) or dequantized (plain safetensors)"
    )
    output: str | None = Field(None, description="directory to write; it must not exist")
    samples: int = Field(256, gt=0, description="calibration examples (windows, for a language model) a task")
    batch_size: int = Field(32, gt=0, description="examples a batch")
    max_length: int | None = Field(
        None, gt=0, description="tokens a text is cut to, or that a language model's windows have (512)"
    )
    activations: Literal["memory", "disk"] = Field(
        "memory", description="where calibration activations wait: memory, or disk (files beside the output; CPU only)"
    )
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    seed: int = Field(0, description="of the calibration draw and of dare")

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        names = [expert.name for expert in self.experts]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"experts: name used twice: {', '.join(sorted(twice))}")
        for field, values in (("scaling", self.merge.scaling), ("weights", self.merge.weights)):
            if isinstance(values, list) and len(values) != len(names):
                raise InputError(f"merge.{field}: {len(values)} values for {len(names)} experts")
        weights = self.quantize.task_weights
        if weights is not None:
            if not self.quantize.guided:
                raise InputError(f"quantize.task_weights: {self.quantize.method} does not use them")
            if set(weights) != set(names):
                raise InputError(f"quantize.task_weights: needs exactly the tasks {', '.join(names)}")
            if min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise InputError("quantize.task_weights: must not be negative, nor all zero")
        return self

    def ordered(self) -> Recipe:
        """The same with the experts by name, so that the order in which they are listed makes no difference."""
        order = sorted(range(len(self.experts)), key=lambda k: self.experts[k].name)
        lists = {
            field: [values[k] for k in order]
            for field in ("scaling", "weights")
            if isinstance(values := getattr(self.merge, field), list)
        }
        experts = [self.experts[k] for k in order]
        return self.model_copy(update={"experts": experts, "merge": self.merge.model_copy(update=lists)})

    def task_weight(self, name: str) -> float:
        """ω of a task; all of them sum to 1."""
        weights = self.quantize.task_weights
        return 1 / len(self.experts) if weights is None else weights[name] / sum(weights.values())


def load_recipe(source: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """Read a recipe from a YAML file or a dict. Relative paths in a file are relative to that file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a recipe; every offending field is named, with what it should be.
    """
    if isinstance(source, Recipe):
        return source
    folder, title = None, "recipe"
    if not isinstance(source, dict):
        path = Path(source)
        if not path.is_file():
            raise MissingError(f"{path}: no such recipe file")
        folder, title = path.parent, str(path)
        try:
            source = parse_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid YAML ({error})") from None
        if not isinstance(source, dict):
            raise InputError(f"{path}: a recipe is a mapping with 'base' and 'experts'")
    try:
        recipe = Recipe.model_validate(source)
    except ValidationError as error:
        raise InputError(f"{title}: " + "; ".join(explain(e) for e in error.errors())) from None
    return recipe if folder is None else _anchor_paths(recipe, folder)


def explain(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {field!r}"
    if error["type"] == "missing":
        return f"field {field!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _anchor_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Paths that exist relative to the recipe's folder are made so; anything else (Hub ids) stays as it is."""

    def fix(value: str | None) -> str | None:
        return str(folder / value) if value and (folder / value).exists() else value

    def fix_data(data: Data | None) -> Data | None:
        return data and data.model_copy(update={"path": fix(data.path), "dataset": fix(data.dataset)})

    experts = [
        expert.model_copy(
            update={
                "model": fix(expert.model),
                "head": fix(expert.head),
                "calibration": fix_data(expert.calibration),
                "evaluation": fix_data(expert.evaluation),
            }
        )
        for expert in recipe.experts
    ]
    return recipe.model_copy(update={"base": fix(recipe.base), "experts": experts})
