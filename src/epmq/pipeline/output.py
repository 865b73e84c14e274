"""What a run leaves behind: weights in the recipe's format, config, heads, processor."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from epmq.calibration.head_refit import Fit
from epmq.export import FORMATS
from epmq.files import write_json
from epmq.models.blocks import LINEAR
from epmq.models.checkpoint import byte_size
from epmq.models.direct import write_directly
from epmq.models.heads import Head, load_head, save_head
from epmq.models.multitask import HEADS, NativeHead, save_native_head
from epmq.models.writer import CheckpointWriter, copy_processor
from epmq.pipeline.journal import Journal
from epmq.pipeline.prepare import PreparedRun, head_file


def write_quantized(job: PreparedRun, folder: Path, journal: Journal) -> tuple[list[str], int]:
    """Write all weights in the recipe's format; returns the quantized layers' names and the bytes of all weights."""
    sources, pack, writer = job.sources, FORMATS[job.recipe.format], CheckpointWriter(folder)
    quantized: list[str] = []
    for name in sources.outside_names():
        writer.add(sources.stored_name(name), sources.merged(name))
    for block in journal:
        for name, weight in block.layers.items():
            quantized.append(name)
            prefix = sources.stored_name(f"{name}.weight").removesuffix(".weight")
            for stored, tensor in pack.tensors(prefix, sources.model.get_submodule(name), weight).items():
                writer.add(stored, tensor)
        for name, tensor in block.tensors.items():
            writer.add(sources.stored_name(name), tensor)
    writer.finish()
    return quantized, sum(writer.sizes.values())


def write_merged(job: PreparedRun, folder: Path, bar: Progress) -> int:
    """Merge into `folder` without quantizing; returns the bytes of all weights."""
    sources = job.sources
    names = {sources.stored_name(name): name for name in sources.names}
    forms = {stored: sources.form(name) for stored, name in names.items()}
    steps = write_directly(folder, forms, lambda stored: sources.merged_parts(names[stored]))
    for _ in bar.track(steps, total=len(names), description="merge"):
        pass
    write_rest(job, folder, [], {})
    return sum(map(byte_size, forms.values()))


def write_rest(
    job: PreparedRun, folder: Path, quantized: list[str], fits: dict[str, tuple[Head | NativeHead, Fit]]
) -> None:
    """Write all that is beside the weights: config, heads, processor."""
    _write_config(job, folder, quantized)
    _write_heads(job, folder, fits)
    copy_processor(job.sources.base.path, folder)


def _write_config(job: PreparedRun, folder: Path, quantized: list[str]) -> None:
    model = job.sources.model
    model.config.save_pretrained(folder)
    config = {**job.sources.config, "architectures": [type(model).__name__]}
    config.pop("quantization_config", None)
    if quantized:
        ignore = [
            name for name, module in model.named_modules() if isinstance(module, LINEAR) and name not in quantized
        ]
        settings = FORMATS[job.recipe.format].config(job.recipe.quantize.grid, ignore)
        if settings is not None:
            config["quantization_config"] = settings
    write_json(folder / "config.json", config)


def _write_heads(job: PreparedRun, folder: Path, fits: dict[str, tuple[Head | NativeHead, Fit]]) -> None:
    """Write every task's head: the expert's own, or what became of it where it follows the model."""
    (folder / HEADS).mkdir()
    for expert in job.recipe.experts:
        target, file = folder / HEADS / f"{expert.name}.safetensors", head_file(job.sources, expert)
        tensors, fitted = job.sources.head_tensors(expert.name), fits.get(expert.name)
        if file is not None:
            head = load_head(file)
            save_head(head if fitted is None else fitted[1].moved(head), target)
        elif tensors:
            config = job.sources.head_config(expert.name)
            assert config is not None
            if fitted is not None and isinstance(fitted[0], NativeHead):
                tensors = fitted[0].with_weights(tensors, fitted[1].weight, fitted[1].bias)
            save_native_head(target, config["architectures"][0], config, tensors)
    if not any((folder / HEADS).iterdir()):
        (folder / HEADS).rmdir()
