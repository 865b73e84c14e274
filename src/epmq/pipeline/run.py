"""From a recipe to a checkpoint: check, merge, quantize, evaluate, write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from epmq.calibration.engine import load_outside, quantize_calibrated, quantize_nearest
from epmq.calibration.head_refit import Fit
from epmq.calibration.offload import Offloader
from epmq.calibration.teacher import Calibration
from epmq.data.encoding import encode, load_processor, split_first, to_device
from epmq.data.readers import Examples
from epmq.errors import InputError
from epmq.files import hash_file, whole_directory, write_json
from epmq.merging.experts import Sources
from epmq.models.blocks import find_stacks, use_fast_matmul
from epmq.models.heads import Head
from epmq.models.meta import why_not_direct
from epmq.models.multitask import MultiTaskModel, NativeHead, load, load_any_head
from epmq.pipeline.evaluation import metrics_of, scorer_of
from epmq.pipeline.journal import Block, Workdir, hash_batches, remove_stale_workdir, resumable
from epmq.pipeline.output import write_merged, write_quantized, write_rest
from epmq.pipeline.prepare import Objects, PreparedRun, check_head, examples_of, head_file, prepare
from epmq.pipeline.verify import check_reloaded, check_stored
from epmq.quantization.grid import QuantizedTensor
from epmq.recipe import Expert, Recipe, load_recipe
from epmq.reporting import report as reporting
from epmq.reporting.page import render_page
from epmq.reporting.runs import Run
from epmq.reporting.scores import score_report
from epmq.runtime import (
    gc_frozen,
    hardware,
    now,
    peak_memory_mb,
    progress_bars,
    reset_peak_memory,
    select_device,
    versions,
)

# Examples on which the layers of each block are sorted by what they read and where they write.
TRIED = 2
# Files of a model that a result can depend on.
READ = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")
# What the report says about a head that follows the model.
FIT = ("strength", "before", "after")


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    progress: bool = True,
    evaluate: bool = True,
    restart: bool = False,
    calibration: Objects | None = None,
    evaluation: Objects | None = None,
) -> dict[str, Any]:
    """Merge, quantize, evaluate and write a checkpoint.

    A run that was stopped, however that came, leaves its finished blocks in `.NAME.work` beside the output; the same
    run started again goes on from them and writes the same weights, byte for byte.

    Args:
        recipe: a YAML file, a dict or a `Recipe`; its `output` must be set and must not exist.
        progress: show progress bars.
        evaluate: score the checkpoint, as it is read back, on the recipe's evaluation data.
        restart: throw away what a run that was stopped has left, instead of going on from there.
        calibration, evaluation: task name → rows as dicts (any iterable of them, such as a `datasets.Dataset`), or
            ready batches of tensors (such as a data loader's), instead of the data that the recipe names.

    Returns:
        the report, as written to `report.json`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: before any compute, with the field, file or tensor at fault, or
            with what has changed since the run that was stopped.
        RuntimeError: another process works on the same output.
    """
    recipe = load_recipe(recipe)
    if recipe.output is None:
        raise InputError("recipe: field 'output' is missing")
    remove_stale_workdir(recipe.output)
    reset_peak_memory()
    clocks: dict[str, dict[str, float]] = {"seconds": {}, "cpu_seconds": {}}
    with progress_bars(progress) as bar, ExitStack() as stack:
        with _timed(clocks, "open"):
            job = prepare(recipe, bar, evaluate=evaluate, calibration=calibration, evaluation=evaluation)
        stack.enter_context(gc_frozen())  # all modules are imported
        layers: list[dict[str, Any]] = []
        heads: dict[str, dict[str, float]] = {}
        if job.recipe.quantize.method == "none":
            work = stack.enter_context(whole_directory(recipe.output))
            with _timed(clocks, "merge and quantize"):
                bytes_ = write_merged(job, work, bar)
        else:
            with _timed(clocks, "open"):
                batches = _calibration(job)
                place = stack.enter_context(resumable(recipe.output, inputs_of(job, batches), restart))
            work = place.output
            with _timed(clocks, "merge and quantize"):
                layers, heads, bytes_ = write_model(job, place, batches, bar)
        peak = peak_memory_mb()
        report: dict[str, Any] = {
            "date": now(),
            "recipe": job.recipe.model_dump(mode="json"),
            "versions": versions(),
            "hardware": hardware(),
            "output": recipe.output,
            "bytes": bytes_,
            "peak_memory_mb": peak,
            **clocks,
            "loss": sum(layer["loss"] or 0.0 for layer in layers),
            "layers": layers,
            "heads": heads,
            "notes": [
                *job.sources.notes,
                *reporting.layer_notes(layers, job.recipe.quantize),
                *_unopened(job.recipe, work),
            ],
        }
        if job.evaluation:
            with _timed(clocks, "evaluate"):
                scores = evaluate_model(load(work, select_device(recipe.device)), job.evaluation, recipe, bar)
            report |= score_report(metrics_of(job.evaluation), scores)
        write_json(work / reporting.REPORT, report)
        (work / reporting.PAGE).write_text(render_page([Run.from_report(report)]), encoding="utf-8")
        (work / reporting.CARD).write_text(reporting.model_card(report), encoding="utf-8")
    return report


def merge(recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True, **settings: Any) -> dict[str, Any]:
    """Merge only: write the full-precision merged checkpoint; scored only if asked for. Else as `run`."""
    recipe = load_recipe(recipe)
    quantize = recipe.quantize.model_copy(update={"method": "none", "task_weights": None})
    wanted = recipe.model_copy(update={"quantize": quantize})
    return run(wanted, progress=progress, **{"evaluate": False, **settings})


def write_model(
    job: PreparedRun, work: Workdir, calibration: list[Calibration], bar: Progress
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]], int]:
    """Merge and quantize into `work.output`: weights, config, heads, processor. Finished blocks are not done again.

    Returns:
        one report a quantized layer, one a head that follows the model, and the bytes of all weights.
    """
    recipe, sources, target = job.recipe, job.sources, select_device(job.recipe.device)
    journal, block = work.journal(recipe.quantize.grid), Block()

    def emit(name: str, tensor: Tensor) -> None:
        block.tensors[name] = tensor

    def emit_layer(name: str, layer: nn.Module, weight: QuantizedTensor) -> None:
        block.layers[name] = weight

    fits: dict[str, tuple[Head | NativeHead, Fit]] = {}
    outputs: list[Tensor] = []

    def emit_head(task: str, head: Head | NativeHead, found: Fit) -> None:
        fits[task] = head, found

    if recipe.quantize.method == "rtn":
        steps: Iterator[list[Any]] = quantize_nearest(sources, emit, emit_layer, done=journal)
    else:
        load_outside(sources, target)
        spill = Offloader(work.output if recipe.activations == "disk" else None)
        steps = quantize_calibrated(
            sources,
            calibration,
            emit,
            emit_layer,
            target,
            emit_head=emit_head,
            emit_output=outputs.append,
            spill=spill,
            done=journal,
        )
    blocks = sum(len(stack.blocks) for stack in find_stacks(sources.model))
    title = f"{recipe.merge.method} + {recipe.quantize.method}"
    layers = []
    for number, reports in enumerate(bar.track(steps, total=blocks, description=title)):
        block.reports = [report.as_dict() for report in reports]
        layers += block.reports
        if number >= journal.found:
            journal.append(block)
        block.layers, block.tensors = {}, {}
    if journal.found:
        sources.notes.append(f"{journal.found} of {blocks} blocks were finished by a run that was stopped")
    quantized, bytes_ = write_quantized(job, work.output, journal)
    write_rest(job, work.output, quantized, fits)
    if not outputs:
        check_stored(work.output, journal, sources.model)
    for output in outputs:
        check_reloaded(work.output, calibration[0].batches[0], output)
    heads = {task: {name: getattr(fit, name) for name in FIT} for task, (_, fit) in fits.items()}
    return layers, heads, bytes_


def _calibration(job: PreparedRun) -> list[Calibration]:
    """Every task's batches as the model takes them, with what makes its head."""
    recipe, sources, found = job.recipe, job.sources, list[Calibration]()
    for expert in recipe.experts if recipe.quantize.calibrates else ():
        encoded = encode(job.calibration[expert.name], job.processor, recipe.batch_size, recipe.max_length)
        batches = [to_device(batch, select_device(recipe.device)) for batch in encoded]
        if not found:
            batches = split_first(batches, TRIED)
        found.append(Calibration(expert.name, batches, partial(_guiding_head, sources, expert)))
    return found


def inputs_of(job: PreparedRun, calibration: list[Calibration]) -> dict[str, Any]:
    """All that decides the result of a run, as plain values: recipe, versions, hashes of files and calibration data.

    Where the output goes, where activations wait and what is evaluated are no part of it.
    """
    unused: Any = {"output": True, "activations": True, "experts": {"__all__": {"calibration", "evaluation"}}}
    recipe = job.recipe.model_dump(mode="json", exclude=unused)
    folders = {job.sources.base.path, *(source.path for source in job.sources.experts.values())}
    files = {file for folder in folders for file in folder.iterdir() if file.name.endswith(READ)}
    files |= {file for expert in job.recipe.experts if (file := head_file(job.sources, expert)) is not None}
    return {
        "recipe": recipe,
        "versions": versions(),
        "files": {str(file): hash_file(file) for file in sorted(files)},
        "calibration": {part.task: hash_batches(part.batches) for part in calibration},
    }


def evaluate_model(
    model: MultiTaskModel, evaluation: dict[str, Examples], recipe: Recipe, bar: Progress
) -> dict[str, float]:
    """The score of every task, in its metric (`epmq.pipeline.evaluation.METRICS`). The model's layers are quickened."""
    use_fast_matmul(model)
    row = bar.add_task("evaluate", total=sum(len(examples) for examples in evaluation.values()))
    return {
        task: scorer_of(examples)(
            model, task, examples, recipe.batch_size, recipe.max_length, lambda n: bar.advance(row, n)
        )
        for task, examples in evaluation.items()
    }


def evaluate_checkpoint(
    path: str | Path, recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True
) -> dict[str, Any]:
    """Score a checkpoint on every task of a recipe that has evaluation data.

    Args:
        path: a checkpoint that epmq wrote.
        recipe: names the evaluation data.

    Returns:
        `metric`, `scores` by task and `mean_score`, as in a report.

    Raises:
        ValueError: the recipe has no evaluation data.
        KeyError: the checkpoint has no head for a task.
    """
    recipe = load_recipe(recipe)
    _, evaluation = _evaluation(recipe)
    with progress_bars(progress) as bar:
        scores = evaluate_model(load(path, select_device(recipe.device)), evaluation, recipe, bar)
    return score_report(metrics_of(evaluation), scores)


def evaluate_experts(
    recipe: str | Path | dict[str, Any] | Recipe, *, base: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Score each expert on its own task: what one model for all tasks is measured against.

    Args:
        recipe: names experts and evaluation data.
        base: measure the base model under each expert's head instead.

    Returns:
        as `evaluate_checkpoint`.
    """
    recipe = load_recipe(recipe)
    sources, evaluation = _evaluation(recipe)
    scores: dict[str, float] = {}
    with progress_bars(progress) as bar:
        for expert in recipe.experts:
            if expert.name not in evaluation:
                continue
            backbone = sources.whole_model(None if base else expert.name, select_device(recipe.device))
            head = _expert_head(sources, expert, backbone)
            heads = {} if head is None else {expert.name: head}
            model = MultiTaskModel(backbone, heads, load_processor(sources.base.path))
            scores |= evaluate_model(model, {expert.name: evaluation[expert.name]}, recipe, bar)
    return score_report(metrics_of(evaluation), scores)


def _expert_head(sources: Sources, expert: Expert, backbone: nn.Module) -> Head | NativeHead | None:
    file, tensors = head_file(sources, expert), sources.head_tensors(expert.name)
    if file is not None:
        return load_any_head(file, backbone)
    config = sources.head_config(expert.name)
    if config is None:
        return None
    return NativeHead(backbone, config["architectures"][0], config, tensors)


def _guiding_head(sources: Sources, expert: Expert, backbone: nn.Module) -> Head | NativeHead | None:
    """An expert's head, if it can be built: one that cannot is carried over as it is, and guides nothing."""
    try:
        return _expert_head(sources, expert, backbone)
    except ValueError as error:
        note = f"expert {expert.name}: its scores cannot guide ({error})"
        if note not in sources.notes:
            sources.notes.append(note)
        return None


def _evaluation(recipe: Recipe) -> tuple[Sources, dict[str, Examples]]:
    if all(expert.evaluation is None for expert in recipe.experts):
        raise InputError("recipe: no expert has evaluation data")
    sources = Sources(recipe)
    processor = load_processor(sources.base.path)
    found = {}
    for expert in recipe.experts:
        if expert.evaluation is not None:
            found[expert.name] = examples_of(sources, expert, processor, "evaluation", None)
            check_head(sources, expert, found[expert.name])
    return sources, found


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


@contextmanager
def _timed(clocks: dict[str, dict[str, float]], phase: str) -> Iterator[None]:
    """Note a phase's time by the wall's clock and by the processors'."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    for clock, spent in (("seconds", time.perf_counter() - wall), ("cpu_seconds", time.process_time() - cpu)):
        clocks[clock][phase] = round(clocks[clock].get(phase, 0.0) + spent, 2)
