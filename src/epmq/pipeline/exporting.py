"""A finished checkpoint, written for the runtimes where people run models, and tried in them."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from epmq.data.encoding import encode
from epmq.data.made import made_examples
from epmq.data.processors import load_processor
from epmq.data.readers import read_data
from epmq.errors import EpmqError, error_context
from epmq.export.form import Form
from epmq.export.target import AS_IT_IS, Coded, Contents, Target, Verified, find_target, has_runtime
from epmq.files import read_json, whole_directory
from epmq.models.checkpoint import DTYPES, architecture_of, read_config
from epmq.models.codes import CodedCheckpoint
from epmq.models.meta import is_generator
from epmq.models.multitask import HEADS
from epmq.models.side_files import CONFIG, copy_files, side_files
from epmq.pipeline.output import form_of, weight_specs
from epmq.pipeline.prepare import PreparedRun
from epmq.recipe import parse_recipe
from epmq.reporting.report import REPORT
from epmq.runtime import progress_bars

# Examples a task on which an export is verified.
TRIED = 8


def export_checkpoint(
    path: str | Path, to: str, output: str | Path | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Write a finished checkpoint for another runtime, from its codes, and try it there.

    Args:
        path: a checkpoint of `format: pack-quantized` that epmq wrote.
        to: one of `epmq.export.target.TARGETS`.
        output: a directory that must not exist; by default `PATH-TO`. Where the runtime opens the checkpoint as it is,
            nothing is written.
        progress: show progress bars.

    Returns:
        target and for whom it is, output, bytes of the weights, and what the verification has found (None where there
        is no runtime that could be tried).

    Raises:
        MissingError, OutputExistsError, InputError: before any compute; what does not fit is named.
        RuntimeError: the runtime computes something else; nothing is kept.
    """
    target, source = find_target(to), CodedCheckpoint(path)
    folder = source.checkpoint.path
    output = Path(output) if output is not None else folder.with_name(f"{folder.name}-{to}")
    target.check(contents_of(source))
    if to in AS_IT_IS:
        return _written(to, target, 0)
    with progress_bars(progress) as bar, whole_directory(output) as work:
        copy_files(side_files(folder), work)
        shutil.copyfile(folder / CONFIG, work / CONFIG)
        if (folder / HEADS).is_dir():
            shutil.copytree(folder / HEADS, work / HEADS)
        return {"output": str(output), **write_target(to, source, work, stored_examples(folder), bar)}


def check_targets(run: PreparedRun) -> None:
    """Refuse, before any compute, what the recipe's targets cannot hold; see `Target.check`."""
    for number, name in enumerate(run.recipe.formats):
        with error_context(f"formats.{number}"):
            find_target(name).check(contents_to_come(run))


def write_targets(run: PreparedRun, folder: Path, scratch: Path, bar: Progress) -> list[dict[str, Any]]:
    """Write a run's output for all its targets, into the output itself; as `export_checkpoint` returns them.

    They are written in `scratch`, a folder on the same disk, and moved when they are whole: what a run that is killed
    has begun is in no output.
    """
    source = CodedCheckpoint(folder)
    examples = [batch for batches in run.calibration.values() for batch in _first(batches)]
    examples = examples or stored_examples(folder)  # what is rounded to nearest is not calibrated
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        work = Path(name)
        written = [write_target(target, source, work, examples, bar) for target in run.recipe.formats]
        for file in [file for file in work.rglob("*") if file.is_file()]:
            place = folder / file.relative_to(work)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    return written


def write_target(
    name: str, source: CodedCheckpoint, folder: Path, examples: Sequence[dict[str, Any]], bar: Progress
) -> dict[str, Any]:
    """Write the files of one target, and verify them where its runtime is installed."""
    target: Target = find_target(name)
    shown = bar.add_task(f"export to {name}", total=2)
    files = target.write(source, folder)
    bar.advance(shown)
    found = target.verify(folder, source.checkpoint.path, examples) if has_runtime(target) else None
    bar.advance(shown)
    return _written(name, target, sum(file.stat().st_size for file in files), found)


def _written(name: str, target: Target, size: int, found: Verified | None = None) -> dict[str, Any]:
    """What a report says of one target."""
    return {"target": name, "title": target.TITLE, "runtime": target.RUNTIME, "bytes": size, "verified": found}


def contents_of(source: CodedCheckpoint) -> Contents:
    """What a finished checkpoint holds."""
    checkpoint, layers = source.checkpoint, dict[str, Coded]()
    for layer, grid in source.grids.items():
        scale = checkpoint.dtype(f"{layer}.weight_scale") or torch.float32
        dtype, table = source.dtype or scale, f"{layer}.weight" in checkpoint
        form = Form(grid, dtype, scale, layer in source.transposed, table)
        values = checkpoint.tensor(f"{layer}.weight_scale")
        layers[layer] = Coded(source.shape(layer), form, values.half().to(values.dtype).equal(values))
    plain = {name: checkpoint.shape(name) for name in source.plain}
    return Contents(checkpoint.config, layers, plain, load_processor(checkpoint.path))


def contents_to_come(run: PreparedRun) -> Contents:
    """What the output of a run will hold."""
    written, shape = run.experts.written, run.experts.base.shape
    layers = dict[str, Coded]()
    for name in run.layout.quantized():
        form, (rows, columns) = form_of(run, name), shape(f"{name}.weight")
        matrix = (columns, rows) if form.transposed else (rows, columns)
        stored = written[f"{name}.weight"].removesuffix(".weight")
        layers[stored] = Coded(matrix, form, form.scale == torch.float16)
    plain = {stored: spec[1] for stored, spec in weight_specs(run).items() if DTYPES[spec[0]].is_floating_point}
    plain = {name: size for name, size in plain.items() if not name.endswith("_scale")}
    return Contents(run.experts.config, layers, plain, run.plan.processor)


def stored_examples(folder: Path) -> list[dict[str, Any]]:
    """Inputs on which a finished checkpoint is tried: of its recipe's calibration data, where that is still there.

    Else they are made up.
    """
    found: list[dict[str, Any]] = []
    processor, config = load_processor(folder), read_config(folder / CONFIG)
    writes = not (folder / HEADS).exists() and is_generator(architecture_of(config) or "")
    use = "text" if not writes else "seq2seq" if config.get("is_encoder_decoder") else "causal"
    try:
        recipe = parse_recipe(read_json(folder / REPORT)["recipe"])
        for expert in recipe.experts:
            if expert.calibration is not None:
                examples = read_data(expert.calibration, use, TRIED, recipe.seed).draw(TRIED, recipe.seed)
                found += encode(examples, processor, TRIED, recipe.max_length)
    except (EpmqError, OSError, KeyError):
        found = []
    if found or processor is None:  # without a tokenizer, there is nothing to make inputs of
        return found
    return list(encode(made_examples(processor, use), processor, TRIED))


def _first(batches: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first few examples of a task's batches."""
    for batch in islice(batches, 1):
        yield {name: value[:TRIED] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
