"""From a recipe to a checkpoint: check, merge, quantize, evaluate, write."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.progress import Progress

from epmq.calibration.context import CalibrationContext
from epmq.calibration.engine import Block, CalibrationEngine, LayerReport, round_blocks
from epmq.calibration.offload import Offloader
from epmq.calibration.sequential import Batch
from epmq.data.encoding import split_first, to_device
from epmq.errors import InputError
from epmq.files import hash_file, whole_directory, write_json
from epmq.merging.readers import TensorReader, guiding_head
from epmq.models.blocks import find_stacks
from epmq.models.checkpoint import bits_per_weight, model_files
from epmq.models.multitask import load
from epmq.models.writer import CheckpointWriter
from epmq.pipeline.budget import check_budget, with_chosen_grids
from epmq.pipeline.evaluation import evaluate_model
from epmq.pipeline.exporting import check_targets, write_targets
from epmq.pipeline.journal import Journal, Workdir, hash_batches, remove_stale_workdir, resumable
from epmq.pipeline.metrics import metrics_of
from epmq.pipeline.opening import note_unopened
from epmq.pipeline.output import QuantizedWeights, parameters_of, weight_specs, write_merged, write_rest
from epmq.pipeline.prepare import Objects, PreparedRun, prepare
from epmq.pipeline.refining import check_refine, read_quantized, refine, refines
from epmq.pipeline.verify import WrongOutputError, check_processor, check_reloaded
from epmq.quantize_settings import Unquantized
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe
from epmq.reporting import report as reporting
from epmq.reporting.page import render_page
from epmq.reporting.runs import Run
from epmq.reporting.scores import score_report
from epmq.runtime import gc_frozen, hardware, now, peak_memory_mb, progress_bars, reset_peak_memory, versions

# Examples on which the layers of each block are sorted by what they read and where they write.
TRIED = 2
# The name under which the journal notes the tensors outside the blocks.
OUTSIDE = "outside"


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    progress: bool = True,
    evaluate: bool = True,
    restart: bool = False,
    strict: bool = False,
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
        strict: where something of base or experts would be dropped, filled in, renamed or left unquantized, raise an
            InputError in the place of a note.
        calibration, evaluation: task name → rows as dicts (any iterable of them, such as a `datasets.Dataset`), or
            ready batches of tensors (such as a data loader's), instead of the data that the recipe names.

    Returns:
        the report, as written to `report.json`.

    Raises:
        MissingError, OutputExistsError, InputError: before any compute, with the field, file or tensor at fault, or
            with what has changed since the run that was stopped.
        EnvironmentFault: another process works on the same output.
    """
    recipe = load_recipe(recipe)
    if recipe.output is None:
        raise InputError("recipe: field 'output' is missing")
    remove_stale_workdir(recipe.output)
    reset_peak_memory()
    clocks = Clocks()
    with progress_bars(progress) as bar, ExitStack() as stack:
        with clocks.phase("open"):
            prepared = prepare(
                recipe, bar, evaluate=evaluate, calibration=calibration, evaluation=evaluation, strict=strict
            )
            check_budget(prepared)
            check_targets(prepared)
            check_refine(prepared)
        stack.enter_context(gc_frozen())  # all modules are imported
        exports: list[dict[str, Any]] = []
        if not prepared.layout.of:
            folder = stack.enter_context(whole_directory(recipe.output))
            with clocks.phase("merge and quantize"):
                written = Written(write_merged(prepared, folder, bar))
                write_rest(prepared, folder, {})
        else:
            with clocks.phase("open"):
                batches = calibration_batches(prepared)
                workdir = stack.enter_context(resumable(recipe.output, inputs_of(prepared, batches), restart))
                prepared = with_chosen_grids(prepared, batches, workdir.kept, bar)
                note_unopened(prepared)
            folder = workdir.output
            written = _quantize(prepared, workdir, batches, bar, clocks)
            if prepared.recipe.formats:
                with clocks.phase("export"):
                    exports = write_targets(prepared, folder, workdir.kept, bar)
        check_processor(folder, prepared.experts, prepared.plan.processor)
        report = {**_report(prepared, written, clocks), "exports": exports}
        if prepared.evaluation:
            with clocks.phase("evaluate"):
                scores = evaluate_model(load(folder, prepared.device), prepared.evaluation, recipe, bar)
            report |= score_report(metrics_of(prepared.evaluation), scores)
        _write_report(folder, report)
    return report


def merge(recipe: str | Path | dict[str, Any] | Recipe, *, progress: bool = True, **settings: Any) -> dict[str, Any]:
    """Merge only: write the full-precision merged checkpoint; scored only if asked for. Else as `run`."""
    unquantized = load_recipe(recipe).model_copy(update={"quantize": Unquantized(), "formats": []})
    return run(unquantized, progress=progress, **{"evaluate": False, **settings})


@dataclass
class Written:
    """What a run has written: bytes of all weights, a report a quantized layer, and how each task's head was fitted.

    `refined` is what `epmq.pipeline.refining.refine` tells, where it was asked for.
    """

    bytes: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    heads: dict[str, dict[str, float]] = field(default_factory=dict)
    refined: dict[str, Any] = field(default_factory=dict)


def calibration_batches(prepared: PreparedRun) -> list[Batch]:
    """Every task's inputs on the device, task by task; the first few examples are a batch of their own."""
    batches: list[Batch] = []
    for task, encoded in prepared.calibration.items():
        inputs = [to_device(one, prepared.device) for one in encoded]
        if not batches:
            inputs = split_first(inputs, TRIED)
        batches += [Batch(task, index, one) for index, one in enumerate(inputs)]
    return batches


def _quantize(
    prepared: PreparedRun, workdir: Workdir, batches: list[Batch], bar: Progress, clocks: "Clocks"
) -> Written:
    """Merge, quantize and, where that is asked for, refine into `workdir.output`."""
    notes, before = prepared.experts.notes, read_quantized(workdir)
    with clocks.phase("merge and quantize"):
        if before is None:
            written = write_quantized(prepared, workdir, batches, bar)
        else:
            written = Written(**before["written"])
            notes += [note for note in before["notes"] if note not in notes]
            notes.append("the model was quantized by a run that was stopped")
    if refines(prepared):
        with clocks.phase("refine"):
            written.refined = refine(prepared, workdir, asdict(written), bar)
    return written


def write_quantized(prepared: PreparedRun, workdir: Workdir, batches: list[Batch], bar: Progress) -> Written:
    """Merge and quantize into `workdir.output`: weights, config, heads, processor. Finished blocks are not done again.

    Raises:
        RuntimeError: what was written is not what was quantized; nothing of it is kept.
    """
    recipe, journal = prepared.recipe, workdir.journal
    with CheckpointWriter(workdir.output, weight_specs(prepared)) as writer:
        weights = QuantizedWeights(prepared, writer)
        if not len(journal):
            journal.append(OUTSIDE, [asdict(report) for report in weights.write_outside()])
        (_, outside), *done = journal
        finished = [Block(name, [LayerReport(**report) for report in reports]) for name, reports in done]
        engine = None
        solved: Iterable[Block] = round_blocks(prepared.experts, prepared.merged, prepared.layout, finished)
        if recipe.calibrates:
            solved = engine = calibration_engine(prepared, batches, finished, weights, workdir.output)
        try:
            layers = outside + _write_blocks(prepared, weights, solved, journal, bar)
            writer.finish()
            fits = engine.head_fits if engine is not None else {}
            write_rest(prepared, workdir.output, fits)
            if engine is not None and engine.output is not None:
                check_reloaded(workdir.output, batches[0].inputs, engine.output, prepared.calls)
        except WrongOutputError:
            journal.clear()
            raise
    ridges = {task: head.fit for task, head in fits.items()}
    heads = {task: {"strength": fit.ridge, "before": fit.before, "after": fit.after} for task, fit in ridges.items()}
    return Written(writer.total, layers, heads)


def _write_blocks(
    prepared: PreparedRun, weights: QuantizedWeights, solved: Iterable[Block], journal: Journal, bar: Progress
) -> list[dict[str, Any]]:
    """Write one finished block after the other, and note it; returns the reports of their layers."""
    recipe, notes, earlier = prepared.recipe, prepared.experts.notes, len(journal) - 1
    blocks, layers = sum(len(stack.blocks) for stack in find_stacks(prepared.experts.model)), list[dict[str, Any]]()
    blocks += bool(prepared.layout.late)
    title = f"{recipe.merge.method} + {recipe.quantize.method}"
    for number, block in enumerate(bar.track(solved, total=blocks, description=title)):
        reports = [asdict(report) for report in block.reports]
        layers += reports
        if number >= earlier:
            weights.write_block(block)
            if not recipe.calibrates:
                weights.check_block(block)
            journal.append(block.name, reports)
    if earlier:
        notes.append(f"{earlier} of {blocks} blocks were finished by a run that was stopped")
    return layers


def calibration_engine(
    prepared: PreparedRun,
    batches: list[Batch],
    finished: Sequence[Block] = (),
    written: TensorReader | None = None,
    offload_to: Path | None = None,
    engine_class: type[CalibrationEngine] = CalibrationEngine,
) -> CalibrationEngine:
    """The engine of a run; `offload_to` is a folder on a disk for activations, where the recipe asks for that."""
    recipe, experts = prepared.recipe, prepared.experts
    context = CalibrationContext(
        experts,
        prepared.merged,
        recipe.quantize,
        recipe.guidance,
        prepared.layout,
        {task: recipe.task_weight(task) for task in experts.experts},
        prepared.device,
        Offloader(offload_to if recipe.activations == "disk" else None),
        prepared.calls,
    )
    make_heads = {task: partial(guiding_head, expert, experts.notes) for task, expert in experts.experts.items()}
    return engine_class(context, batches, make_heads, finished, written)


def inputs_of(prepared: PreparedRun, batches: list[Batch]) -> dict[str, Any]:
    """All that decides the result of a run, as plain values: recipe, versions, hashes of files and calibration data.

    Where the output goes, for which runtimes it is written, where activations wait and what is evaluated are no part of
    it.
    """
    unused: Any = dict.fromkeys(("output", "formats", "activations"), True)
    unused["experts"] = {"__all__": {"calibration", "evaluation"}}
    experts = prepared.experts
    folders = {experts.base.path, *(expert.path for expert in experts.experts.values())}
    files = {file for folder in folders for file in model_files(folder)}
    files |= set(prepared.side_files.values())
    files |= {expert.head_file for expert in experts.experts.values() if expert.head_file is not None}
    tasks = groupby(batches, key=lambda batch: batch.task)
    refining = {task: hash_batches(own) for task, own in prepared.refining.items()}
    return {
        **({"refining": refining} if refining else {}),
        "recipe": prepared.recipe.model_dump(mode="json", exclude=unused),
        "versions": versions(),
        "files": {str(file): hash_file(file) for file in sorted(files)},
        "calibration": {task: hash_batches(batch.inputs for batch in own) for task, own in tasks},
    }


def _report(prepared: PreparedRun, written: Written, clocks: "Clocks") -> dict[str, Any]:
    recipe, layers, parameters = prepared.recipe, written.layers, parameters_of(prepared)
    return {
        "date": now(),
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "hardware": hardware(),
        "output": recipe.output,
        "bytes": written.bytes,
        "parameters": parameters,
        "bits_per_weight": bits_per_weight(written.bytes, parameters),
        "peak_memory_mb": peak_memory_mb(),
        "seconds": clocks.seconds,
        "cpu_seconds": clocks.cpu_seconds,
        "loss": sum(layer["loss"] or 0.0 for layer in layers),
        "layers": [{name: value for name, value in layer.items() if value or name != "pooled"} for layer in layers],
        "heads": written.heads,
        **({"refine": written.refined} if written.refined else {}),
        "notes": prepared.experts.notes + reporting.layer_notes(layers, recipe.guidance),
    }


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    write_json(folder / reporting.REPORT, report)
    (folder / reporting.PAGE).write_text(render_page([Run.from_report(report)]), encoding="utf-8")
    (folder / reporting.CARD).write_text(reporting.model_card(report), encoding="utf-8")


class Clocks:
    """The time of each phase, by the wall's clock and by the processors'."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to a phase."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        spent = time.perf_counter() - wall, time.process_time() - cpu
        for clock, seconds in zip((self.seconds, self.cpu_seconds), spent):
            clock[name] = round(clock.get(name, 0.0) + seconds, 2)
