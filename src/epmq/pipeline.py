"""From a recipe to a checkpoint: check, merge, quantize, evaluate, write."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from epmq import report as reporting
from epmq.blocks import LINEAR, find_stacks, linears
from epmq.checkpoint import CheckpointWriter, check_output, copy_processor, whole_directory, write_json
from epmq.data import Examples, encode, load_processor, read_examples
from epmq.evaluate import accuracy
from epmq.export import FORMATS
from epmq.grid import QuantizedTensor
from epmq.heads import HEAD_FILE, Head, load_head
from epmq.multitask import HEADS, MultiTaskModel, NativeHead, _to, load, load_any_head, save_native_head
from epmq.quantize import check_grid, load_outside, quantize_calibrated, quantize_nearest, read_blocks
from epmq.skeleton import load_model, why_not_direct
from epmq.sources import Sources
from epmq.spec import Data, Expert, Recipe, load_recipe
from epmq.streams import Calibration


@dataclass
class Job:
    """A recipe whose every part has been opened and checked; nothing has been computed."""

    recipe: Recipe
    sources: Sources
    processor: Any
    calibration: dict[str, Examples]
    evaluation: dict[str, Examples]


def prepare(recipe: Recipe, bar: Progress | None = None, *, evaluate: bool = True) -> Job:
    """Open everything a run will need and check that it fits together.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: the field, file or tensor at fault is named.
    """
    if recipe.output is not None:
        check_output(recipe.output)
    calibration, evaluation = {}, {}
    for expert in recipe.experts:
        if recipe.quantize.calibrates:
            if expert.calibration is None:
                method = recipe.quantize.method
                raise ValueError(f"experts.{expert.name}.calibration: {method} needs calibration data")
            samples = expert.calibration.samples or recipe.samples
            calibration[expert.name] = _read(expert.calibration, expert, "calibration").draw(samples, recipe.seed)
        if evaluate and expert.evaluation is not None:
            examples = _read(expert.evaluation, expert, "evaluation")
            evaluation[expert.name] = examples.draw(expert.evaluation.samples, recipe.seed)
            if examples.labels is None:
                raise ValueError(f"experts.{expert.name}.evaluation: {expert.evaluation.path} has no labels")
    sources = Sources(recipe)
    if recipe.quantize.method != "none":
        check_grid(sources)
        check_format(sources)
    for expert in recipe.experts:
        check_head(sources, expert, evaluation.get(expert.name))
    for _ in (bar or bars(False)).track(
        sources.check_finite(), total=1 + len(recipe.experts), description="check weights"
    ):
        pass
    processor = load_processor(sources.base.path)
    for name, examples in (calibration | evaluation).items():
        try:
            next(encode(examples, processor, 1, recipe.max_length))
        except ValueError as error:
            raise ValueError(f"experts.{name}: {error}") from None
    return Job(recipe, sources, processor, calibration, evaluation)


def check_format(sources: Sources) -> None:
    """Check before any compute that the format has a form for every layer that would be quantized.

    Raises:
        ValueError: a layer does not fit; it is named.
    """
    name = sources.recipe.format
    for stack in find_stacks(sources.model) if FORMATS[name].NEEDS_LINEAR else []:
        for index, block in enumerate(stack.blocks):
            for layer, module in linears(block):
                if not isinstance(module, nn.Linear):
                    where = f"{stack.block_name(index)}.{layer}"
                    raise ValueError(f"format: {name} cannot hold {where}, a {type(module).__name__}: use dequantized")


def check_head(sources: Sources, expert: Expert, evaluation: Examples | None) -> None:
    """Check before any compute that an expert's head can be read, and fits the model and the evaluation data.

    Raises:
        FileNotFoundError, ValueError: expert and file are named.
    """
    place, file = f"experts.{expert.name}", head_file(sources, expert)
    if file is None:
        if evaluation is not None and not sources.head_tensors(expert.name):
            raise ValueError(f"{place}: evaluation needs a head, and neither {HEAD_FILE} nor a task head is there")
        return
    head = load_head(file)
    features, width = head.weight.shape[1], getattr(sources.model.config, "hidden_size", None)
    if width is not None and features != width * (2 if head.pooling == "cls_mean" else 1):
        raise ValueError(f"{place}: {file} takes {features} features, but the model's hidden size is {width}")
    labels = None if evaluation is None else evaluation.labels
    if labels is not None and not 0 <= labels.min() <= labels.max() < len(head.weight):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"{place}.evaluation: label {wrong} but the head has {len(head.weight)} classes")


def _read(data: Data, expert: Expert, field: str) -> Examples:
    try:
        return read_examples(data.path, data.text, data.label)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"experts.{expert.name}.{field}: {error}") from None


def run(
    recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True, evaluate: bool = True
) -> dict[str, Any]:
    """Merge, quantize, evaluate and write a checkpoint.

    Args:
        recipe: a YAML file, a dict or a `Recipe`; its `output` must be set and must not exist.
        progress: show progress bars.
        evaluate: measure accuracy on the recipe's evaluation data with the checkpoint as it is read back.

    Returns:
        the report, as written to `report.json`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: before any compute, with the field, file or tensor at fault.
    """
    recipe = load_recipe(recipe)
    if recipe.output is None:
        raise ValueError("recipe: field 'output' is missing")
    reporting.reset_peak_memory()
    seconds: dict[str, float] = {}
    with bars(progress) as bar, ExitStack() as stack:
        with _timed(seconds, "open"):
            job = prepare(recipe, bar, evaluate=evaluate)
        work = stack.enter_context(whole_directory(recipe.output))
        with _timed(seconds, "merge and quantize"):
            layers, bytes_ = write_model(job, work, bar)
        peak = reporting.peak_memory_mb()
        report: dict[str, Any] = {
            "date": reporting.now(),
            "recipe": recipe.model_dump(mode="json"),
            "versions": reporting.versions(),
            "hardware": reporting.hardware(),
            "output": recipe.output,
            "bytes": bytes_,
            "peak_memory_mb": peak,
            "seconds": seconds,
            "loss": sum(layer["loss"] or 0.0 for layer in layers),
            "layers": layers,
            "notes": job.sources.notes + _raised(job.recipe, layers) + _unopened(job.recipe, work),
        }
        if job.evaluation:
            with _timed(seconds, "evaluate"):
                scores = evaluate_model(load(work, device(recipe)), job.evaluation, recipe, bar)
            report |= {"accuracy": scores, "mean_accuracy": sum(scores.values()) / len(scores)}
        report["seconds"] = {phase: round(value, 2) for phase, value in seconds.items()}
        write_json(work / "report.json", report)
        (work / "README.md").write_text(reporting.model_card(report), encoding="utf-8")
    return report


def merge(
    recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True, evaluate: bool = False
) -> dict[str, Any]:
    """Merge only: write the full-precision merged checkpoint. Arguments and result as in `run`."""
    recipe = load_recipe(recipe)
    settings = recipe.quantize.model_copy(update={"method": "none", "task_weights": None})
    return run(recipe.model_copy(update={"quantize": settings}), progress=progress, evaluate=evaluate)


def write_model(job: Job, folder: Path, bar: Progress) -> tuple[list[dict[str, Any]], int]:
    """Merge and quantize into `folder`: weights, config, heads, processor.

    Returns:
        one report a quantized layer, and the bytes of all weights.
    """
    recipe, sources = job.recipe, job.sources
    writer, pack, target = CheckpointWriter(folder), FORMATS[recipe.format], device(recipe)
    quantized: list[str] = []

    def emit(name: str, tensor: Tensor) -> None:
        writer.add(sources.stored_name(name), tensor)

    def emit_layer(name: str, layer: nn.Module, weight: QuantizedTensor) -> None:
        quantized.append(name)
        prefix = sources.stored_name(f"{name}.weight").removesuffix(".weight")
        for stored, tensor in pack.tensors(prefix, layer, weight).items():
            writer.add(stored, tensor)

    load_outside(sources, emit, target)
    blocks = sum(len(stack.blocks) for stack in find_stacks(sources.model))
    title = "merge" if recipe.quantize.method == "none" else f"{recipe.merge.method} + {recipe.quantize.method}"
    if recipe.quantize.method == "none":
        steps: Iterator[list[Any]] = read_blocks(sources, emit)
    elif recipe.quantize.method == "rtn":
        steps = quantize_nearest(sources, emit, emit_layer)
    else:
        calibration = [
            Calibration(
                task, [_to(b, target) for b in encode(examples, job.processor, recipe.batch_size, recipe.max_length)]
            )
            for task, examples in job.calibration.items()
        ]
        steps = quantize_calibrated(sources, calibration, emit, emit_layer, target)
    layers = [layer.as_dict() for step in bar.track(steps, total=blocks, description=title) for layer in step]
    writer.finish()
    _write_config(job, folder, quantized)
    _write_heads(job, folder)
    copy_processor(sources.base.path, folder)
    return layers, sum(writer.sizes.values())


def _write_config(job: Job, folder: Path, quantized: list[str]) -> None:
    model = job.sources.model
    model.config.save_pretrained(folder)
    config = {**job.sources.base.config, "architectures": [type(model).__name__]}
    config.pop("quantization_config", None)
    if quantized:
        ignore = [
            name for name, module in model.named_modules() if isinstance(module, LINEAR) and name not in quantized
        ]
        settings = FORMATS[job.recipe.format].config(job.recipe.quantize.grid, ignore)
        if settings is not None:
            config["quantization_config"] = settings
    write_json(folder / "config.json", config)


def head_file(sources: Sources, expert: Expert) -> Path | None:
    """The head file of an expert: the one its recipe names, or the one beside its weights."""
    beside = sources.experts[expert.name].path / HEAD_FILE
    return Path(expert.head) if expert.head else beside if beside.exists() else None


def _write_heads(job: Job, folder: Path) -> None:
    (folder / HEADS).mkdir()
    for expert in job.recipe.experts:
        target, file = folder / HEADS / f"{expert.name}.safetensors", head_file(job.sources, expert)
        tensors = job.sources.head_tensors(expert.name)
        if file is not None:
            load_head(file)
            shutil.copyfile(file, target)
        elif tensors:
            config = job.sources.experts[expert.name].config
            save_native_head(target, config["architectures"][0], config, tensors)
    if not any((folder / HEADS).iterdir()):
        (folder / HEADS).rmdir()


def evaluate_model(
    model: MultiTaskModel, evaluation: dict[str, Examples], recipe: Recipe, bar: Progress
) -> dict[str, float]:
    """Accuracy on every task."""
    row = bar.add_task("evaluate", total=sum(len(examples) for examples in evaluation.values()))
    return {
        task: accuracy(model, task, examples, recipe.batch_size, recipe.max_length, lambda n: bar.advance(row, n))
        for task, examples in evaluation.items()
    }


def evaluate_checkpoint(
    path: str | Path, recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True
) -> dict[str, float]:
    """Accuracy of a checkpoint on every task of a recipe that has evaluation data.

    Args:
        path: a checkpoint that epmq wrote.
        recipe: names the evaluation data.

    Raises:
        ValueError: the recipe has no evaluation data.
        KeyError: the checkpoint has no head for a task.
    """
    recipe = load_recipe(recipe)
    evaluation = _evaluation(recipe)
    with bars(progress) as bar:
        return evaluate_model(load(path, device(recipe)), evaluation, recipe, bar)


def evaluate_experts(
    recipe: str | Path | dict[str, Any] | Recipe, *, base: bool = False, progress: bool = True
) -> dict[str, float]:
    """Accuracy of each expert on its own task: what one model for all tasks is measured against.

    Args:
        recipe: names experts and evaluation data.
        base: measure the base model under each expert's head instead.
    """
    recipe = load_recipe(recipe)
    evaluation = _evaluation(recipe)
    scores: dict[str, float] = {}
    sources = Sources(recipe.model_copy(update={"experts": [e for e in recipe.experts if e.name in evaluation]}))
    with bars(progress) as bar:
        for expert in sources.recipe.experts:
            checkpoint = sources.base if base else sources.experts[expert.name]
            config = {"architectures": [type(sources.model).__name__]}
            backbone = load_model(checkpoint.path, config).to(device(recipe))
            heads = {expert.name: _expert_head(sources, expert, backbone)}
            model = MultiTaskModel(backbone, heads, load_processor(sources.base.path))
            scores |= evaluate_model(model, {expert.name: evaluation[expert.name]}, recipe, bar)
    return scores


def _expert_head(sources: Sources, expert: Expert, backbone: nn.Module) -> Head | NativeHead:
    file, tensors = head_file(sources, expert), sources.head_tensors(expert.name)
    if file is not None:
        return load_any_head(file, backbone)
    if not tensors:
        raise ValueError(f"experts.{expert.name}: neither {HEAD_FILE} nor a task head is there")
    config, place = sources.experts[expert.name].config, next(backbone.parameters()).device
    tensors = {name: tensor.to(place) for name, tensor in tensors.items()}
    return NativeHead(backbone, config["architectures"][0], config, tensors)


def _evaluation(recipe: Recipe) -> dict[str, Examples]:
    found = {
        expert.name: _read(expert.evaluation, expert, "evaluation").draw(expert.evaluation.samples, recipe.seed)
        for expert in recipe.experts
        if expert.evaluation is not None
    }
    if not found:
        raise ValueError("recipe: no expert has evaluation data")
    return found


def _unopened(recipe: Recipe, folder: Path) -> list[str]:
    """A note if transformers alone cannot read what was written."""
    if recipe.quantize.method == "none" or recipe.format != "pack-quantized":
        return []
    reason = why_not_direct(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if reason is None:
        return []
    return [
        f"AutoModel.from_pretrained cannot open this packed model ({reason}): use epmq.load, or format: dequantized"
    ]


def _raised(recipe: Recipe, layers: list[dict[str, Any]]) -> list[str]:
    wanted = recipe.quantize.strength
    return [
        f"{layer['name']}: strength raised from {wanted:g} to {layer['strength']:g} to factor its Hessian"
        for layer in layers
        if layer["strength"] is not None and layer["strength"] != wanted
    ]


def device(recipe: Recipe) -> torch.device:
    """The device a recipe asks for; `auto` takes an accelerator if there is one."""
    if recipe.device != "auto":
        return torch.device(recipe.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bars(show: bool) -> Progress:
    """Progress bars on standard error."""
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not show)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
