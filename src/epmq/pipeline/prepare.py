"""Before any compute: open everything that a recipe names and check that it fits together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from epmq.data.encoding import encode, load_processor, pack
from epmq.data.examples import Examples, Fields, Pictures
from epmq.data.readers import fields_of, from_objects, read_data
from epmq.errors import InputError, error_context
from epmq.export import FORMATS
from epmq.files import check_output
from epmq.merging.compatibility import open_experts
from epmq.merging.experts import BaseReader, ExpertReader, ExpertSet
from epmq.merging.merged import MergedWeights
from epmq.merging.relation import check_relation
from epmq.models.blocks import as_matrix, block_linears, is_transposed
from epmq.models.heads import HEAD_FILE, load_head
from epmq.models.meta import vocabulary
from epmq.pipeline.metrics import metric_of
from epmq.recipe import Data, Expert, Recipe
from epmq.runtime import select_device

# Task name → rows (dicts), or ready batches (dicts of tensors), in place of the data that the recipe names.
Objects = Mapping[str, Iterable[Any]]
# Share of the blocks' weights that may lie in no linear layer without a note.
UNTOUCHED = 0.05


@dataclass
class PreparedRun:
    """A recipe whose every part has been opened and checked; nothing has been computed."""

    recipe: Recipe  # with everything filled in that depends on the checkpoints, experts by name
    experts: ExpertSet
    merged: MergedWeights
    processor: Any  # the base's tokenizer or image processor, or None
    calibration: dict[str, list[dict[str, Any]]]  # task → inputs of the model, batch by batch
    evaluation: dict[str, Examples]  # task → labelled examples

    @property
    def device(self) -> torch.device:
        return select_device(self.recipe.device)


def prepare(
    recipe: Recipe,
    bar: Progress | None = None,
    *,
    evaluate: bool = True,
    calibration: Objects | None = None,
    evaluation: Objects | None = None,
    strict: bool = False,
) -> PreparedRun:
    """Open everything a run will need and check that it fits together; `strict` as in `epmq.run`.

    Raises:
        MissingError, OutputExistsError, InputError: the field, file or tensor at fault is named.
    """
    _check_fields(recipe, calibration or {}, evaluation or {})
    listed, recipe = recipe.experts, recipe.ordered()
    experts = open_experts(recipe.base, recipe.experts, recipe.config)
    recipe = recipe.resolved(all(expert.has_head for expert in experts.experts.values()))
    if recipe.quantize.method != "none":
        _check_layers(experts, recipe)
        for note in _untouched(experts):
            experts.notes.depart(note)
    experts.notes += check_relation(experts)
    processor = load_processor(experts.base.path)
    inputs, scored = {}, {}
    for expert in recipe.experts:
        data = ExpertData(experts, recipe, expert, processor)
        if recipe.quantize.calibrates:
            inputs[expert.name] = data.calibration(calibration)
        if evaluate and (expert.evaluation is not None or expert.name in (evaluation or {})):
            scored[expert.name] = data.evaluation(evaluation)
        check_head(experts, expert.name, scored.get(expert.name))
    if scored:
        _check_task_classes(experts)
    if recipe.quantize.method != "none":  # a mere merge reads the weights once and finds out as early
        readers: list[BaseReader | ExpertReader] = [experts.base, *experts.experts.values()]
        for reader in readers if bar is None else bar.track(readers, description="check weights"):
            reader.check_finite()
    if strict:
        experts.notes.refuse()
    scored = {expert.name: scored[expert.name] for expert in listed if expert.name in scored}
    merged = MergedWeights(experts, recipe.merge, recipe.seed)
    return PreparedRun(recipe, experts, merged, processor, inputs, scored)


def _check_fields(recipe: Recipe, calibration: Objects, evaluation: Objects) -> None:
    """Check what needs no checkpoint to be open."""
    if recipe.output is not None:
        check_output(recipe.output)
    for name in {**calibration, **evaluation}:
        if name not in [expert.name for expert in recipe.experts]:
            raise InputError(f"data for {name!r}, but the recipe has no expert of that name")
    for expert in recipe.experts:
        if recipe.quantize.calibrates and expert.calibration is None and expert.name not in calibration:
            raise InputError(f"experts.{expert.name}.calibration: {recipe.quantize.method} needs calibration data")
    device = select_device(recipe.device)
    if recipe.activations == "disk" and device.type != "cpu":
        raise InputError(f"activations: disk works on a CPU only, not on {device}")


def _check_layers(experts: ExpertSet, recipe: Recipe) -> None:
    """Check that grid and format can hold every layer that would be quantized."""
    grid, holds_transposed = recipe.quantize.grid, FORMATS[recipe.format].HOLDS_TRANSPOSED
    for name, layer in block_linears(experts.model):
        with error_context(f"quantize.group_size: {name}"):
            grid.width(as_matrix(layer, layer.get_parameter("weight")).shape[1])
    for name, layer in block_linears(experts.model):
        if is_transposed(layer) and not holds_transposed:
            raise InputError(f"format: {recipe.format} cannot hold {name}, a {type(layer).__name__}: use dequantized")


def _untouched(experts: ExpertSet) -> list[str]:
    """A note on large weights of the blocks that are in no linear layer, such as fused experts of a mixture."""
    layers = {f"{name}.weight" for name, _ in block_linears(experts.model)}
    outside, shape = set(experts.outside_names()), experts.base.shape
    sizes = {name: prod(shape(name)) for name in experts.names if name not in layers | outside}
    untouched, total = sum(sizes.values()), sum(sizes.values()) + sum(prod(shape(name)) for name in layers)
    if untouched <= UNTOUCHED * total:
        return []
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        f"{100 * untouched / total:.0f} % of the blocks' weights lie in no linear layer and are not quantized; the "
        f"largest: {largest}"
    ]


@dataclass
class ExpertData:
    """The examples of one expert, drawn, packed and tried on the processor."""

    experts: ExpertSet
    recipe: Recipe
    expert: Expert
    processor: Any

    def calibration(self, objects: Objects | None) -> list[dict[str, Any]]:
        """Calibration inputs of the model, batch by batch; `objects` take the place of the recipe's data.

        Raises:
            MissingError, InputError: expert, field and file are named.
        """
        data = self.expert.calibration
        count = data.samples if data and data.samples is not None else self.recipe.samples
        with error_context(f"experts.{self.expert.name}.calibration"):
            return self._encoded(self._examples(data, objects, count))

    def evaluation(self, objects: Objects | None) -> Examples:
        """Labelled examples to score; arguments and errors as in `calibration`."""
        data = self.expert.evaluation
        with error_context(f"experts.{self.expert.name}.evaluation"):
            examples = self._examples(data, objects, data.samples if data else None)
            tried = examples
            if isinstance(examples.inputs, Pictures):  # a large test set is read once, when it is scored
                tried = examples.take(np.arange(min(len(examples), self.recipe.batch_size)))
            self._encoded(tried)
            examples = replace(examples, metric=data.metric if data else None)
            self._check_scored(examples, data)
        return examples

    def _examples(self, data: Data | None, objects: Objects | None, count: int | None) -> Examples:
        recipe, use = self.recipe, _text_use(self.experts, self.expert.name)
        if objects and self.expert.name in objects:
            columns = fields_of(data) if data else Fields()
            examples = from_objects(objects[self.expert.name], columns, use, "python objects")
        else:
            assert data is not None
            examples = read_data(data, use, count, recipe.seed)
        if examples.kind == "causal" and (data is None or data.pack):
            return pack(examples, self.processor, recipe.max_length, count, recipe.seed)
        return examples if examples.kind == "batches" else examples.draw(count, recipe.seed)

    def _encoded(self, examples: Examples) -> list[dict[str, Any]]:
        batches = list(encode(examples, self.processor, self.recipe.batch_size, self.recipe.max_length))
        for batch in batches:
            _check_tokens(self.experts, batch)
        return batches

    def _check_scored(self, examples: Examples, data: Data | None) -> None:
        """Check that examples can be scored with what they hold, on this model."""
        metric, model = metric_of(examples), self.experts.model
        if metric == "accuracy" and examples.labels is None:
            raise InputError(f"{data.path or data.dataset if data else 'python objects'} has no labels")
        if metric == "log_perplexity" and (not model.can_generate() or model.config.is_encoder_decoder):
            raise InputError(
                f"{examples.kind} examples are scored by perplexity, which {type(model).__name__} does not give"
            )


def _text_use(experts: ExpertSet, task: str) -> str:
    """How an expert takes texts (one of `USES`): it classifies them with a head, else it writes them."""
    if experts.experts[task].has_head:
        return "text"
    if experts.model.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if experts.model.can_generate() else "text"


def _check_tokens(experts: ExpertSet, batch: dict[str, Any]) -> None:
    """Check that a batch has tokens, and the model an embedding for each."""
    rows = vocabulary(experts.model)
    for name in ("input_ids", "decoder_input_ids", "labels"):
        ids = batch.get(name)
        if not isinstance(ids, torch.Tensor):
            continue
        if name == "input_ids" and not ids.numel():
            raise InputError("a batch of examples has no tokens at all")
        if rows is not None and ids.numel() and int(ids.max()) >= rows:
            raise InputError(
                f"token {int(ids.max())} in {name}, but {experts.base.path} has {rows} embeddings: the tokenizer is "
                "another model's"
            )


def check_head(experts: ExpertSet, task: str, evaluation: Examples | None) -> None:
    """Check that an expert's head can be read, and fits the model and the evaluation data.

    Raises:
        MissingError, InputError: expert and file are named.
    """
    field, expert = f"experts.{task}", experts.experts[task]
    file = expert.head_file
    if file is None:
        metric = None if evaluation is None else metric_of(evaluation)
        if metric == "accuracy" and expert.head_config is None:
            raise InputError(f"{field}: evaluation needs a head, and neither {HEAD_FILE} nor a task head is there")
        return
    head = load_head(file)
    pooled = head.weight if head.projection is None else head.projection
    features, width = pooled.shape[1], getattr(experts.model.config, "hidden_size", None)
    if width is not None and features != width * (2 if head.pooling == "cls_mean" else 1):
        raise InputError(f"{field}: {file} takes {features} features, but the model's hidden size is {width}")
    labels = None if evaluation is None else evaluation.labels
    if labels is not None and not 0 <= labels.min() <= labels.max() < len(head.weight):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{field}.evaluation: label {wrong} but the head has {len(head.weight)} classes")


def _check_task_classes(experts: ExpertSet) -> None:
    """Check that heads of task classes can be built: evaluation, at the end, loads all of them."""
    for expert in experts.experts.values():
        if expert.head_file is None:
            try:
                expert.head(experts.model)
            except ValueError as error:
                raise InputError(f"expert {expert.task}: {error} ({expert.path})") from None
