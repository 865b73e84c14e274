"""Before any compute: open everything that a recipe names and check that it fits together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from epmq.calibration.calls import BlockCalls, StubModel, try_forwards
from epmq.calibration.head_refit import heads_follow
from epmq.calibration.outside import unread_modules
from epmq.data.encoding import pack
from epmq.data.examples import Examples, Fields, Pictures
from epmq.data.labels import Labels
from epmq.data.readers import fields_of, from_objects, read_data
from epmq.data.same_processor import differs_in_media
from epmq.errors import InputError, error_context
from epmq.files import check_output
from epmq.merging.accounting import listed
from epmq.merging.compatibility import open_experts
from epmq.merging.experts import ExpertSet
from epmq.merging.merged import MergedWeights
from epmq.merging.readers import BaseReader, ExpertReader
from epmq.merging.relation import check_relation
from epmq.models.blocks import block_linears
from epmq.models.heads import HEAD_FILE, load_head, read_head_file
from epmq.models.side_files import add_modules, side_files
from epmq.models.storage import Layout
from epmq.models.tasks import Task
from epmq.models.towers import beside_language
from epmq.pipeline import tasks
from epmq.pipeline.inputs import Batches, ModelInputs
from epmq.pipeline.layout import LayoutPlanner, fit_dtypes
from epmq.pipeline.metrics import metric_of
from epmq.pipeline.processor import OutputProcessor, output_processor
from epmq.pipeline.verify import opened_from
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
    calibration: dict[str, list[dict[str, Any]]]  # task → inputs of the model, batch by batch
    evaluation: dict[str, Examples]  # task → labelled examples
    side_files: dict[str, Path] = field(default_factory=dict)  # path in the output → file of the base
    plan: OutputProcessor = field(default_factory=OutputProcessor)  # the output's processor and chat templates
    calls: BlockCalls = field(default_factory=BlockCalls)  # how the model calls its blocks on the calibration inputs
    # As `calibration`, where refine has examples of its own.
    refining: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)  # how every tensor is stored; empty where nothing is quantized

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
    asked, recipe = recipe.experts, recipe.ordered()
    more = recipe.quantize.own_samples
    if more is not None and calibration:  # rows are read twice
        calibration = {name: rows if hasattr(rows, "__len__") else list(rows) for name, rows in calibration.items()}
    experts = open_experts(recipe.base, recipe.experts, recipe.tokenizer, recipe.config)
    planner = LayoutPlanner(experts, recipe.quantize) if recipe.quantize.method != "none" or recipe.calibrates else None
    first = Layout()
    if planner is not None:
        _check_settings(recipe)
        first = planner.layout()  # what does not fit is an error before any data is read
        if recipe.format != "dequantized":
            experts.write_matrices({*first.quantized(), *first.free})
        experts.notes += _kept_beside(first, experts)
        for note in _untouched(experts):
            experts.notes.depart(note)
    experts.notes += check_relation(experts)
    plan = output_processor(experts)
    beside = side_files(experts.base.path, plan.processor)
    _note_processors(experts, plan.processor, beside)
    model_inputs = ModelInputs(experts, recipe, plan.processor, opened_from(beside, experts, plan))
    inputs, refining, scored = dict[str, Batches](), dict[str, Batches](), dict[str, Examples]()
    for expert in recipe.experts:
        data = ExpertData(experts, recipe, expert, model_inputs, plan.templates.get(expert.name))
        if recipe.calibrates:
            inputs[expert.name] = data.calibration(calibration)
        if more is not None:
            refining[expert.name] = data.calibration(calibration, more)
        if evaluate and (expert.evaluation is not None or expert.name in (evaluation or {})):
            scored[expert.name] = data.evaluation(evaluation)
        check_head(experts, expert.name, scored.get(expert.name))
    stub = StubModel(experts) if recipe.calibrates else None
    calls = BlockCalls() if stub is None else try_forwards(experts, inputs, stub, first.solves)
    heads = all(expert.has_head for expert in experts.experts.values())
    if heads and recipe.calibrates and recipe.guidance.refit_heads:
        heads = heads_follow(experts, inputs, stub)
    recipe = recipe.resolved(heads)
    _check_task_classes(experts, scored)
    if planner is not None:  # a mere merge reads the weights once and finds out as early
        readers: list[BaseReader | ExpertReader] = [experts.base, *experts.experts.values()]
        for reader in readers if bar is None else bar.track(readers, description="check weights"):
            reader.check_finite()
    if strict:
        experts.notes.refuse()
    scored = {expert.name: scored[expert.name] for expert in asked if expert.name in scored}
    merged = MergedWeights(experts, recipe.merge, recipe.seed)
    if merged.uses_factors:
        experts.notes.append(
            f"all experts are LoRA adapters: {recipe.merge.method} merges in the span of their factors"
        )
    layout = Layout()
    if planner is not None:
        late = None if stub is None else calls.late
        unread = [] if stub is None else unread_modules(experts, inputs, calls.late, stub)
        layout = fit_dtypes(planner.layout(late, unread), experts, merged, recipe.quantize.rest)
        if layout.dropped:
            experts.notes.append(f"no head reads {', '.join(layout.dropped)}: left out")
    return PreparedRun(recipe, experts, merged, inputs, scored, beside, plan, calls, refining, layout)


def _note_processors(experts: ExpertSet, processor: Any, beside: dict[str, Path]) -> None:
    """Note where experts see or pool otherwise than the base; modules that all of them share are the output's."""
    folders = {task: expert.path for task, expert in experts.experts.items()}
    for note in add_modules(beside, experts.base.path, folders):
        experts.notes.depart(note)
    for task, folder in folders.items():
        what = differs_in_media(processor, folder)
        if what is not None:
            experts.notes.depart(f"expert {task}: its processor takes {what} otherwise than the base's, which is used")


def _check_fields(recipe: Recipe, calibration: Objects, evaluation: Objects) -> None:
    """Check what needs no checkpoint to be open."""
    if recipe.output is not None:
        check_output(recipe.output)
    for name in {**calibration, **evaluation}:
        if name not in [expert.name for expert in recipe.experts]:
            raise InputError(f"data for {name!r}, but the recipe has no expert of that name")
    for expert in recipe.experts:
        if recipe.calibrates and expert.calibration is None and expert.name not in calibration:
            method = recipe.quantize.method if recipe.quantize.calibrates else recipe.merge.method
            raise InputError(f"experts.{expert.name}.calibration: {method} needs calibration data")
    device = select_device(recipe.device)
    if recipe.activations == "disk" and device.type != "cpu":
        raise InputError(f"activations: disk works on a CPU only, not on {device}")


def _check_settings(recipe: Recipe) -> None:
    """Check that what is asked for, and takes calibration data, has some."""
    settings = recipe.quantize
    if (settings.budget is not None or settings.size is not None) and not settings.calibrates:
        raise InputError(f"quantize.budget, size: {settings.method} has no data on which bits could be chosen")
    if settings.drop_unused and not settings.calibrates:
        raise InputError(
            f"quantize.drop_unused: what heads read is seen on calibration data, and {settings.method} has none"
        )


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


def _kept_beside(layout: Layout, experts: ExpertSet) -> list[str]:
    """A note on the towers and projectors beside a language model of which no layer is quantized."""
    beside = beside_language(experts.model)
    changed = {beside[name] for name in beside if layout.solves(name) or layout.grid(name) is not None}
    kept = [part for part in dict.fromkeys(beside.values()) if part not in changed]
    return [f"beside the language model, not quantized: {listed(kept)}; overrides may say otherwise"] if kept else []


@dataclass
class ExpertData:
    """The examples of one expert, drawn, packed and tried on the processor."""

    experts: ExpertSet
    recipe: Recipe
    expert: Expert
    inputs: ModelInputs
    template: str | None = None  # of chats, where it is not the output's default

    def calibration(self, objects: Objects | None, count: int | None = None) -> list[dict[str, Any]]:
        """Calibration inputs of the model, batch by batch; `objects` take the place of the recipe's data.

        `count` is how many examples are drawn; None takes as many as the recipe says.

        Raises:
            MissingError, InputError: expert, field and file are named.
        """
        data = self.expert.calibration
        if count is None:
            count = data.samples if data and data.samples is not None else self.recipe.samples
        where = f"experts.{self.expert.name}.calibration"
        with error_context(where):
            if getattr(self.recipe.quantize, "adapt_heads", False):
                self._check_outputs()
            return self._encoded(self._examples(data, objects, count, where), where)[1]

    def evaluation(self, objects: Objects | None) -> Examples:
        """Labelled examples to score; arguments and errors as in `calibration`."""
        data = self.expert.evaluation
        where = f"experts.{self.expert.name}.evaluation"
        with error_context(where):
            self._check_outputs()
            labels = self.task.labels if self.task else None
            examples = self._examples(data, objects, data.samples if data else None, where, labels)
            source = data.path or data.dataset if data else None
            examples = tasks.as_scored(examples, self.task, data.metric if data else None, source or "python objects")
            tried = examples
            if isinstance(examples.inputs, Pictures):  # a large test set is read once, when it is scored
                tried = examples.take(np.arange(min(len(examples), self.recipe.batch_size)))
            examples = replace(examples, longest=self._encoded(tried, where, scored=True)[0].longest)
            tasks.try_windows(tried, self.inputs.processor, self.recipe.max_length, examples.longest[0])
            self._check_scored(examples)
        return examples

    @cached_property
    def task(self) -> Task | None:
        """What the expert's head answers; None if it has none."""
        return tasks.task_of(self.experts.experts[self.expert.name])

    def _check_outputs(self) -> None:
        tasks.check_outputs(self.experts.experts[self.expert.name].head_file, self.experts.model)

    def _examples(
        self, data: Data | None, objects: Objects | None, count: int | None, where: str, labels: Labels | None = None
    ) -> Examples:
        recipe = self.recipe
        use = self.task.use if self.task is not None else _text_use(self.experts)
        if objects and self.expert.name in objects:
            columns = fields_of(data) if data else Fields()
            examples = from_objects(objects[self.expert.name], columns, use, "python objects", labels)
        else:
            assert data is not None
            self.inputs.check_files()
            examples = read_data(data, use, count, recipe.seed, labels)
        examples = replace(examples, template=self.template)
        if examples.kind == "causal" and (data is None or data.pack):
            return pack(examples, self.inputs.processor, self.inputs.window(where), count, recipe.seed)
        return examples if examples.kind == "batches" else examples.draw(count, recipe.seed)

    def _encoded(self, examples: Examples, where: str, scored: bool = False) -> tuple[Examples, Batches]:
        model_takes = partial(tasks.calibration_inputs, task=self.task, model=self.experts.model)
        examples, batches = self.inputs.encode(examples, where, scored, model_takes)
        for batch in batches:
            tasks.check_ends(batch, self.task, self.experts.model)
        return examples, batches

    def _check_scored(self, examples: Examples) -> None:
        """Check that examples can be scored with what they hold, on this model."""
        metric, model = metric_of(examples), self.experts.model
        if metric == "log_perplexity" and (not model.can_generate() or model.config.is_encoder_decoder):
            raise InputError(
                f"{examples.kind} examples are scored by perplexity, which {type(model).__name__} does not give"
            )


def _text_use(experts: ExpertSet) -> str:
    """How an expert without a head takes texts (one of `USES`): it writes them where it can."""
    if experts.model.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if experts.model.can_generate() else "text"


def check_head(experts: ExpertSet, task: str, evaluation: Examples | None) -> None:
    """Check that an expert's head can be read and fits the model; and that it has one, if it is scored with one.

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
    if "architecture" in read_head_file(file)[1]:
        return  # a task class, which is built before anything is scored
    head = load_head(file)
    pooled = head.weight if head.projection is None else head.projection
    features, width = pooled.shape[1], getattr(experts.model.config, "hidden_size", None)
    if width is not None and features != width * (2 if head.pooling == "cls_mean" else 1):
        raise InputError(f"{field}: {file} takes {features} features, but the model's hidden size is {width}")


def _check_task_classes(experts: ExpertSet, scored: Mapping[str, Examples]) -> None:
    """Check that heads of task classes can be built, or leave them out: the output opens with all that it has."""
    for task, expert in experts.experts.items():
        if expert.head_file is None:
            try:
                expert.head(experts.model)
            except ValueError as error:
                if task in scored:
                    raise InputError(f"expert {task}: {error} ({expert.path})") from None
                expert.leave_out_head()
                experts.notes.depart(f"expert {task}: {error}; its head is left out ({expert.path})")
