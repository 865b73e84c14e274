"""The recipe: everything that a run needs to know, as frozen data with its checks. Nothing here opens a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from epmq.errors import InputError
from epmq.merge_settings import Merge, Regression, TaskArithmetic, settings_classes
from epmq.quantize_settings import ExpertGuided, Guidance, Guided, Quantize, Unquantized
from epmq.storage_settings import PLAIN, Strict

# Methods of quantizing that go with merges on calibration data. Codes are chosen in the Hessian that the target was
# fitted in: that of the quantized model's inputs, unless they are the experts' own.
REGRESSION = {"regmean": ("none",), "regmean_pp": ("none", "gptq")}
# RegMean has no anchor; this much of one holds what no input reaches.
NO_RIDGE = 1e-6
UNROUNDED = {name: PLAIN for name in ("bits", "embeddings", "output_layer")} | {"rest": "as-stored"}


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
    label: str | list[str] = Field(
        "label",
        description="name of the label column (a class index or name, a number, or a list of classes), or of a column "
        "for each class",
    )
    image: str = Field("image", description="name of the image column: a path beside the file, a picture, or a list")
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
    question: str = Field("question", description="name of the column with questions, for question answering")
    context: str = Field("context", description="name of the column with the texts that answer them")
    references: str = Field("answers", description="name of the column with the right answers, as in SQuAD or as texts")
    words: str = Field("tokens", description="name of the column with lists of words, for token classification")
    tags: str = Field("tags", description="name of the column with a class for each word, by index or name")
    choices: str | list[str] = Field(
        "choices", description="multiple choice: name of the column with lists of texts, or of a column for each choice"
    )
    metric: Literal["accuracy", "f1", "exact_match", "spearman", "pearson", "mse", "log_perplexity"] | None = Field(
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


class Recipe(Strict):
    """One run: K experts in, one checkpoint out."""

    base: str = Field(description="the model that all experts were fine-tuned from: Hugging Face directory or Hub id")
    experts: list[Expert] = Field(min_length=1)
    merge: Merge = TaskArithmetic()
    quantize: Quantize = ExpertGuided()
    config: dict[str, Any] = Field(
        {},
        description="fields of the merged model's config.json, by name, where base and experts differ; {} takes the "
        "base's, and a difference that changes what is computed is an error",
    )
    format: Literal["pack-quantized", "dequantized"] = Field(
        "pack-quantized", description="pack-quantized (compressed-tensors) or dequantized (plain safetensors)"
    )
    formats: list[Literal["onnx", "onnx-int8", "gguf", "gptq", "vllm"]] = Field(
        [],
        description="other runtimes that the output is written for, from the same codes, beside its weights: onnx, "
        "onnx-int8 (faster, activations of 8 bits), gguf, gptq; vllm is checked alone",
    )
    tokenizer: str = Field(
        "auto",
        description="tokens of the output: base, union, the name of an expert, or auto: the base's, and where experts "
        "have tokens that it lacks, the union",
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
    seed: int = Field(0, description="of the calibration draw, of dare and of della")

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.formats and (self.format != "pack-quantized" or self.quantize.method == "none"):
            raise InputError("formats: they are made of codes: use format: pack-quantized, and a quantizer")
        names = [expert.name for expert in self.experts]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"experts: name used twice: {', '.join(sorted(twice))}")
        if self.tokenizer not in ("auto", "base", "union", *names):
            raise InputError(f"tokenizer: {self.tokenizer!r} is not auto, base, union or one of {', '.join(names)}")
        for field, values in self._per_expert().items():
            if len(values) != len(names):
                raise InputError(f"merge.{field}: {len(values)} values for {len(names)} experts")
        self.merge.check_experts(len(names))
        if isinstance(self.merge, Regression) and self.quantize.method not in REGRESSION[self.merge.method]:
            takes = " or ".join(REGRESSION[self.merge.method])
            raise InputError(f"merge.method: {self.merge.method} goes with quantize.method: {takes}")
        weights = self._task_weights()
        if weights is not None:
            if set(weights) != set(names):
                raise InputError(f"quantize.task_weights: needs exactly the tasks {', '.join(names)}")
            if min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise InputError("quantize.task_weights: must not be negative, nor all zero")
        return self

    def _per_expert(self) -> dict[str, list[float]]:
        """Settings of the merge that are lists: they have a value an expert."""
        return {name: value for name, value in self.merge if isinstance(value, list)}

    def _task_weights(self) -> dict[str, float] | None:
        return self.quantize.task_weights if isinstance(self.quantize, Guided) else None

    def ordered(self) -> Recipe:
        """The same with the experts by name, so that the order in which they are listed makes no difference.

        What merges on calibration data alone is a run whose layers are not rounded.
        """
        order = sorted(range(len(self.experts)), key=lambda k: self.experts[k].name)
        update: dict[str, Any] = {"experts": [self.experts[k] for k in order], "merge": self.merge.reordered(order)}
        if self.merge.calibrates and isinstance(self.quantize, Unquantized):
            update["quantize"] = Unquantized.model_validate(UNROUNDED)
        return self.model_copy(update=update)

    @property
    def calibrates(self) -> bool:
        """Whether a run looks at calibration data."""
        return self.merge.calibrates or self.quantize.calibrates

    @property
    def guidance(self) -> Guidance:
        """What calibration makes of the experts."""
        guidance, merge = self.quantize.guidance(), self.merge
        if not isinstance(merge, Regression):
            return guidance
        fit = replace(guidance, experts=True, ridge=NO_RIDGE, biases=False)
        return replace(fit, own_inputs=merge.own_inputs, off_diagonal=merge.off_diagonal)

    def resolved(self, heads: bool) -> Recipe:
        """The same with everything filled in that depends on the checkpoints: on whether all heads can follow."""
        defaults = self.quantize.defaults(heads, self.merge.far_anchor)
        missing = {name: value for name, value in defaults.items() if getattr(self.quantize, name) is None}
        return self.model_copy(update={"quantize": self.quantize.model_copy(update=missing)})

    def task_weight(self, name: str) -> float:
        """ω of a task; all of them sum to 1."""
        weights = self._task_weights()
        return 1 / len(self.experts) if weights is None else weights[name] / sum(weights.values())


# First part of the path of a pydantic error → the union that it leads to, and where in the path the method stands.
Sections = Mapping[str, tuple[Any, int]]
SECTIONS: Sections = {"merge": (Merge, 1), "quantize": (Quantize, 1)}


def explain(error: Any, sections: Sections = SECTIONS) -> str:
    """One of pydantic's errors in our words: the field, and what it should be."""
    path = [str(part) for part in error["loc"]]
    union, depth = sections.get(path[0] if path else "", (None, 0))
    classes = {} if union is None else settings_classes(union)
    # pydantic puts the method into the path, where no recipe has it.
    method = path.pop(depth) if len(path) > depth and path[depth] in classes else None
    field = ".".join(path)
    if error["type"] == "extra_forbidden":
        if any(path[-1] in one.model_fields for one in classes.values()):
            return f"{field}: {method} does not use it"
        return f"unknown field {field!r}"
    if error["type"] == "missing":
        return f"field {field!r} is missing"
    if error["type"] == "union_tag_invalid":
        return f"{field}.method: {error['input'].get('method')!r} is not one of {', '.join(classes)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def parse_recipe(content: Mapping[str, Any], title: str = "recipe") -> Recipe:
    """A recipe from plain values; `title` is what an error calls them.

    Raises:
        InputError: not a recipe; every offending field is named, with what it should be.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{title}: " + "; ".join(explain(one) for one in error.errors())) from None
