"""Before any compute: open everything that a recipe names and check that it fits together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from epmq.calibration.engine import check_grid
from epmq.data.encoding import encode, load_processor, pack
from epmq.data.examples import Examples, Pictures
from epmq.data.readers import fields_of, from_objects, read_data
from epmq.errors import InputError
from epmq.export import FORMATS
from epmq.files import check_output
from epmq.merging.compatibility import check_compatibility
from epmq.merging.experts import Sources
from epmq.models.blocks import block_linears
from epmq.models.heads import HEAD_FILE, load_head
from epmq.models.meta import vocabulary
from epmq.models.multitask import NativeHead
from epmq.pipeline.evaluation import metric_of
from epmq.recipe import Data, Expert, Recipe
from epmq.runtime import select_device

# Task name → rows (dicts), or ready batches (dicts of tensors), in place of the data that the recipe names.
Objects = Mapping[str, Iterable[Any]]


@dataclass
class PreparedRun:
    """A recipe whose every part has been opened and checked; nothing has been computed."""

    recipe: Recipe
    sources: Sources
    processor: Any
    calibration: dict[str, Examples]
    evaluation: dict[str, Examples]


def prepare(
    recipe: Recipe,
    bar: Progress | None = None,
    *,
    evaluate: bool = True,
    calibration: Objects | None = None,
    evaluation: Objects | None = None,
) -> PreparedRun:
    """Open everything a run will need and check that it fits together.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: the field, file or tensor at fault is named.
    """
    if recipe.output is not None:
        check_output(recipe.output)
    for name in {**(calibration or {}), **(evaluation or {})}:
        if name not in [expert.name for expert in recipe.experts]:
            raise InputError(f"data for {name!r}, but the recipe has no expert of that name")
    for expert in recipe.experts:
        if recipe.quantize.calibrates and expert.calibration is None and expert.name not in (calibration or {}):
            raise InputError(f"experts.{expert.name}.calibration: {recipe.quantize.method} needs calibration data")
    if recipe.activations == "disk" and select_device(recipe.device).type != "cpu":
        raise InputError(f"activations: disk works on a CPU only, not on {select_device(recipe.device)}")
    listed, recipe = recipe.experts, recipe.ordered()
    sources = Sources(recipe)
    heads = [head_file(sources, e) is not None or sources.head_config(e.name) is not None for e in recipe.experts]
    recipe = sources.recipe = recipe.model_copy(update={"quantize": recipe.quantize.resolved(all(heads))})
    if recipe.quantize.method != "none":
        check_grid(sources)
        check_format(sources)
        sources.notes += _untouched(sources)
    sources.notes += check_compatibility(sources)
    processor = load_processor(sources.base.path)
    used, scored = {}, {}
    for expert in recipe.experts:
        if recipe.quantize.calibrates:
            used[expert.name] = examples_of(sources, expert, processor, "calibration", calibration)
        if evaluate and (expert.evaluation is not None or expert.name in (evaluation or {})):
            scored[expert.name] = examples_of(sources, expert, processor, "evaluation", evaluation)
        check_head(sources, expert, scored.get(expert.name))
    if scored:
        check_task_classes(sources)
    if recipe.quantize.method != "none":  # a mere merge reads the weights once and finds out as early
        steps = sources.check_finite()
        for _ in steps if bar is None else bar.track(steps, total=1 + len(recipe.experts), description="check weights"):
            pass
    scored = {expert.name: scored[expert.name] for expert in listed if expert.name in scored}
    return PreparedRun(recipe, sources, processor, used, scored)


def _untouched(sources: Sources) -> list[str]:
    """A note on large weights of the blocks that are in no linear layer, such as fused experts of a mixture."""
    layers = {f"{name}.weight" for name, _ in block_linears(sources.model)}
    outside = set(sources.outside_names())
    left = {name: prod(sources.base_shape(name)) for name in sources.names if name not in layers | outside}
    total = sum(left.values()) + sum(prod(sources.base_shape(name)) for name in layers)
    if sum(left.values()) <= 0.05 * total:
        return []
    largest = max(left, key=lambda name: left[name])
    share = 100 * sum(left.values()) / total
    return [
        f"{share:.0f} % of the blocks' weights lie in no linear layer and are not quantized; the largest: {largest}"
    ]


def text_use(sources: Sources, expert: Expert) -> str:
    """How an expert takes texts (one of `USES`): it classifies them with a head, else it writes them."""
    if head_file(sources, expert) is not None or sources.head_config(expert.name) is not None:
        return "text"
    if sources.model.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if sources.model.can_generate() else "text"


def examples_of(sources: Sources, expert: Expert, processor: Any, field: str, objects: Objects | None) -> Examples:
    """An expert's examples, drawn, packed and tried on the processor.

    Args:
        sources: base and experts.
        expert: whose examples.
        processor: the base's tokenizer or image processor.
        field: `calibration` or `evaluation`.
        objects: rows or batches that take the place of the recipe's data.

    Raises:
        FileNotFoundError, ValueError: expert, field and file are named.
    """
    recipe, place = sources.recipe, f"experts.{expert.name}.{field}"
    data: Data | None = getattr(expert, field)
    use = text_use(sources, expert)
    count = data.samples if data else None
    if count is None and field == "calibration":
        count = recipe.samples
    try:
        if objects and expert.name in objects:
            examples = from_objects(objects[expert.name], fields_of(data), use, "python objects")
        else:
            assert data is not None
            examples = read_data(data, use, count, recipe.seed)
        if examples.kind == "causal" and (data is None or data.pack):
            examples = pack(examples, processor, recipe.max_length, count, recipe.seed)
        elif examples.kind != "batches":
            examples = examples.draw(count, recipe.seed)
        tried = examples
        if isinstance(examples.inputs, Pictures):  # a large test set is read once, when it is scored
            tried = examples.take(np.arange(min(len(examples), recipe.batch_size)))
        for batch in encode(tried, processor, recipe.batch_size, recipe.max_length):
            check_tokens(sources, batch)
        if field == "evaluation":
            examples = replace(examples, metric=data.metric if data else None)
            check_scored(sources, examples, data)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{place}: {error}") from None
    return examples


def check_tokens(sources: Sources, batch: dict[str, Any]) -> None:
    """Check before any compute that a batch has tokens, and the model an embedding for each.

    Raises:
        ValueError: there are none, or the tokenizer is not this model's.
    """
    for name in ("input_ids", "decoder_input_ids", "labels"):
        ids, rows = batch.get(name), vocabulary(sources.model)
        if name == "input_ids" and isinstance(ids, torch.Tensor) and not ids.numel():
            raise InputError("a batch of examples has no tokens at all")
        if isinstance(ids, torch.Tensor) and rows is not None and ids.numel() and int(ids.max()) >= rows:
            raise InputError(
                f"token {int(ids.max())} in {name}, but {sources.base.path} has {rows} embeddings: the tokenizer is "
                "another model's"
            )


def check_format(sources: Sources) -> None:
    """Check before any compute that the format has a form for every layer that would be quantized.

    Raises:
        ValueError: a layer does not fit; it is named.
    """
    name = sources.recipe.format
    for where, module in block_linears(sources.model) if FORMATS[name].NEEDS_LINEAR else []:
        if not isinstance(module, nn.Linear):
            raise InputError(f"format: {name} cannot hold {where}, a {type(module).__name__}: use dequantized")


def check_head(sources: Sources, expert: Expert, evaluation: Examples | None) -> None:
    """Check before any compute that an expert's head can be read, and fits the model and the evaluation data.

    Raises:
        FileNotFoundError, ValueError: expert and file are named.
    """
    place, file = f"experts.{expert.name}", head_file(sources, expert)
    if file is None:
        scored = None if evaluation is None else metric_of(evaluation)
        if scored == "accuracy" and sources.head_config(expert.name) is None:
            raise InputError(f"{place}: evaluation needs a head, and neither {HEAD_FILE} nor a task head is there")
        return
    head = load_head(file)
    taken = head.weight if head.projection is None else head.projection
    features, width = taken.shape[1], getattr(sources.model.config, "hidden_size", None)
    if width is not None and features != width * (2 if head.pooling == "cls_mean" else 1):
        raise InputError(f"{place}: {file} takes {features} features, but the model's hidden size is {width}")
    labels = None if evaluation is None else evaluation.labels
    if labels is not None and not 0 <= labels.min() <= labels.max() < len(head.weight):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{place}.evaluation: label {wrong} but the head has {len(head.weight)} classes")


def check_task_classes(sources: Sources) -> None:
    """Check before any compute that heads of task classes can be built: evaluation, at the end, loads all of them.

    Raises:
        ValueError: one cannot; expert and folder are named.
    """
    for expert in sources.recipe.experts:
        config = sources.head_config(expert.name)
        if config is None or head_file(sources, expert) is not None:
            continue
        try:
            NativeHead(sources.model, config["architectures"][0], config, sources.head_tensors(expert.name))
        except ValueError as error:
            raise InputError(f"expert {expert.name}: {error} ({sources.experts[expert.name].path})") from None


def check_scored(sources: Sources, examples: Examples, data: Data | None) -> None:
    """Check before any compute that examples can be scored with what they hold, on this model.

    Raises:
        ValueError: they cannot.
    """
    metric, model = metric_of(examples), sources.model
    if metric == "accuracy" and examples.labels is None:
        raise InputError(f"{data.path or data.dataset if data else 'python objects'} has no labels")
    if metric == "log_perplexity" and (not model.can_generate() or model.config.is_encoder_decoder):
        raise InputError(
            f"{examples.kind} examples are scored by perplexity, which {type(model).__name__} does not give"
        )


def head_file(sources: Sources, expert: Expert) -> Path | None:
    """The head file of an expert: the one its recipe names, or the one beside its weights."""
    beside = sources.experts[expert.name].path / HEAD_FILE
    return Path(expert.head) if expert.head else beside if beside.exists() else None
