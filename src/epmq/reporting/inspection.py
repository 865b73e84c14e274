"""Look into a checkpoint without loading it: headers, config and report."""

from pathlib import Path
from typing import Any

from rich.table import Table

from epmq.errors import error_context
from epmq.files import read_json
from epmq.models.checkpoint import Checkpoint, architecture_of, byte_size, resolve
from epmq.models.multitask import HEADS
from epmq.reporting.report import REPORT, block_losses
from epmq.reporting.scores import score_title, shown_scores


def contents(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, from its headers.

    Returns:
        `tensors`: name → (dtype on disk, shape, bytes); `quantization`: weight settings from the config, or None;
        `tasks`: names of the heads; `report`: content of report.json, or None; `architecture`.

    Raises:
        FileNotFoundError, ValueError: not a checkpoint; the file is named.
    """
    checkpoint = Checkpoint(resolve(path))
    specs = {name: checkpoint.spec(name) for name in checkpoint.names}
    with error_context(checkpoint.path / "config.json", "quantization_config is not as compressed-tensors writes it"):
        groups = (checkpoint.config.get("quantization_config") or {}).get("config_groups") or {}
        weights = next((group.get("weights") for group in groups.values()), None)
    report = checkpoint.path / REPORT
    return {
        "architecture": architecture_of(checkpoint.config) or "unknown",
        "tensors": {name: (dtype, list(shape), byte_size((dtype, shape))) for name, (dtype, shape) in specs.items()},
        "quantization": weights,
        "tasks": sorted(file.stem for file in (checkpoint.path / HEADS).glob("*.safetensors")),
        "report": read_json(report) if report.exists() else None,
    }


def inspection_tables(path: str | Path, layers: bool = False) -> list[Table]:
    """Rich tables for the terminal: overview, sizes by part and, if asked, every quantized layer."""
    checkpoint = contents(path)
    with error_context(path, "config.json or report.json is not as epmq writes it"):
        tables = [_overview(path, checkpoint), _sizes(checkpoint["tensors"])]
        if report := checkpoint["report"]:
            tables += [table for table in (_scores(report), _depth(report)) if table.row_count]
            tables += [_layers(report)] if layers else []
    return tables


def _overview(path: str | Path, checkpoint: dict[str, Any]) -> Table:
    table = Table(title=str(path), title_justify="left", show_header=False)
    table.add_row("architecture", checkpoint["architecture"])
    text = "not packed"
    if weights := checkpoint["quantization"]:
        symmetric = "symmetric" if weights["symmetric"] else "asymmetric"
        text = f"{weights['num_bits']} bits, {symmetric}, group size {weights.get('group_size') or 'a row'}"
    table.add_row("weights", text)
    table.add_row("tasks", ", ".join(checkpoint["tasks"]) or "no heads")
    table.add_row("size", f"{sum(size for *_, size in checkpoint['tensors'].values()) / 1e6:.1f} MB")
    if report := checkpoint["report"]:
        recipe = report["recipe"]
        table.add_row("base", recipe["base"])
        table.add_row("merge", recipe["merge"]["method"])
        table.add_row("quantize", recipe["quantize"]["method"])
        table.add_row("made", f"{report['date']} with epmq {report['versions']['epmq']}")
        if mean := shown_scores(report).get("mean"):
            table.add_row(f"mean {score_title(report.get('metric'))}", mean)
        for note in report["notes"]:
            table.add_row("note", note)
    return table


def _sizes(tensors: dict[str, tuple[str, list[int], int]]) -> Table:
    """Sizes of the packed weights and of all else, and the three largest tensors."""
    table = Table("part", "tensors", "size", title="sizes", title_justify="left")
    for part, packed in (("quantized weights", True), ("other tensors", False)):
        named = tensors.items()
        sizes = [size for name, (*_, size) in named if name.rpartition(".")[2].startswith("weight_") == packed]
        table.add_row(part, str(len(sizes)), f"{sum(sizes) / 1e6:.1f} MB")
    for name, (dtype, shape, size) in sorted(tensors.items(), key=lambda item: -item[1][2])[:3]:
        table.add_row(f"  {name}", f"{dtype} {shape}", f"{size / 1e6:.1f} MB")
    return table


def _scores(report: dict[str, Any]) -> Table:
    table = Table("task", score_title(report.get("metric")), title="scores", title_justify="left")
    for task, score in shown_scores(report).items():
        table.add_row(task, score)
    return table


def _depth(report: dict[str, Any]) -> Table:
    """Losses by depth, as bars: what the merged weights are off the target, and what the codes are."""
    table = Table("block", "merging", "", "quantization", "", title="deviation by depth", title_justify="left")
    blocks = block_losses(layer for layer in report["layers"] if layer["loss"] is not None)
    most = max((loss for _, *losses in blocks for loss in losses), default=0.0)
    for block, *losses in blocks:
        table.add_row(block, *(cell for loss in losses for cell in (f"{loss:.3g}", _bar(loss, most))))
    return table


def _bar(value: float, most: float) -> str:
    """A bar of up to 20 characters, in eighths."""
    eighths = round(160 * value / most) if most > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _layers(report: dict[str, Any]) -> Table:
    table = Table("layer", "shape", "loss", "merge loss", "tokens", title="quantized layers", title_justify="left")
    for layer in report["layers"]:
        losses = [f"{layer[key]:.4g}" if layer[key] is not None else "–" for key in ("loss", "merge_loss")]
        table.add_row(layer["name"], "×".join(map(str, layer["shape"])), *losses, str(layer["tokens"]))
    return table
