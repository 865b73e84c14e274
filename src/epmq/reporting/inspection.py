"""Look into a checkpoint without loading it: headers, config and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from epmq.errors import error_context
from epmq.files import read_json
from epmq.models.checkpoint import Checkpoint, architecture_of, byte_size, resolve
from epmq.models.multitask import HEADS
from epmq.reporting.page import by_block
from epmq.reporting.report import REPORT, score_title, shown_scores


def contents(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, from its headers.

    Returns:
        `tensors`: name → (kind on disk, shape, bytes); `quantization`: weight settings from the config, or None;
        `tasks`: names of the heads; `report`: content of report.json, or None; `architecture`.

    Raises:
        FileNotFoundError, ValueError: not a checkpoint; the file is named.
    """
    checkpoint = Checkpoint(resolve(path))
    tensors = {}
    for name in checkpoint.names:
        kind, shape = checkpoint.dtype_name(name), checkpoint.shape(name)
        tensors[name] = (kind, list(shape), byte_size((kind, shape)))
    with error_context(checkpoint.path / "config.json", "quantization_config is not as compressed-tensors writes it"):
        groups = (checkpoint.config.get("quantization_config") or {}).get("config_groups") or {}
        weights = next((group.get("weights") for group in groups.values()), None)
    report = checkpoint.path / REPORT
    return {
        "architecture": architecture_of(checkpoint.config) or "unknown",
        "tensors": tensors,
        "quantization": weights,
        "tasks": sorted(file.stem for file in (checkpoint.path / HEADS).glob("*.safetensors")),
        "report": read_json(report) if report.exists() else None,
    }


def inspection_tables(path: str | Path, layers: bool = False) -> list[Table]:
    """Rich tables for the terminal: overview, sizes by kind of tensor and, if asked, every quantized layer."""
    found = contents(path)
    with error_context(path, "config.json or report.json is not as epmq writes it"):
        tables = [_overview(path, found), _sizes(found)]
        if found["report"]:
            tables += [table for table in (_scores(found["report"]), _depth(found["report"])) if table.row_count]
        if layers and found["report"]:
            tables.append(_layers(found["report"]))
    return tables


def _overview(path: str | Path, found: dict[str, Any]) -> Table:
    table = Table(title=str(path), title_justify="left", show_header=False)
    table.add_row("architecture", found["architecture"])
    weights = found["quantization"]
    if weights:
        group = weights.get("group_size") or "a row"
        symmetric = "symmetric" if weights["symmetric"] else "asymmetric"
        table.add_row("weights", f"{weights['num_bits']} bits, {symmetric}, group size {group}")
    else:
        table.add_row("weights", "not packed")
    table.add_row("tasks", ", ".join(found["tasks"]) or "no heads")
    table.add_row("size", f"{sum(size for *_, size in found['tensors'].values()) / 1e6:.1f} MB")
    report = found["report"]
    if report:
        recipe = report["recipe"]
        table.add_row("base", recipe["base"])
        table.add_row("merge", recipe["merge"]["method"])
        table.add_row("quantize", recipe["quantize"]["method"])
        table.add_row("made", f"{report['date']} with epmq {report['versions']['epmq']}")
        mean = shown_scores(report).get("mean")
        if mean:
            table.add_row(f"mean {score_title(report)}", mean)
        for note in report["notes"]:
            table.add_row("note", note)
    return table


def _sizes(found: dict[str, Any]) -> Table:
    def kind_of(name: str) -> str:
        return "quantized weights" if name.rpartition(".")[2].startswith("weight_") else "other tensors"

    table = Table("part", "tensors", "size", title="sizes", title_justify="left")
    for part in ("quantized weights", "other tensors"):
        sizes = [size for name, (*_, size) in found["tensors"].items() if kind_of(name) == part]
        table.add_row(part, str(len(sizes)), f"{sum(sizes) / 1e6:.1f} MB")
    largest = sorted(found["tensors"].items(), key=lambda item: -item[1][2])[:3]
    for name, (kind, shape, size) in largest:
        table.add_row(f"  {name}", f"{kind} {shape}", f"{size / 1e6:.1f} MB")
    return table


def _scores(report: dict[str, Any]) -> Table:
    table = Table("task", score_title(report), title="scores", title_justify="left")
    for task, score in shown_scores(report).items():
        table.add_row(task, score)
    return table


def _depth(report: dict[str, Any]) -> Table:
    """Losses by depth, as bars: what the merged weights are off the target, and what the codes are."""
    table = Table("block", "merging", "", "quantization", "", title="deviation by depth", title_justify="left")
    blocks = by_block(layer for layer in report["layers"] if layer["loss"] is not None)
    most = max((value for _, *values in blocks for value in values), default=0.0)
    for name, *values in blocks:
        table.add_row(name, *(cell for value in values for cell in (f"{value:.3g}", _bar(value, most))))
    return table


def _bar(value: float, most: float) -> str:
    """A bar of up to 20 characters, in eighths."""
    eighths = round(160 * value / most) if most > 0 else 0
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def _layers(report: dict[str, Any]) -> Table:
    table = Table("layer", "shape", "loss", "merge loss", "tokens", title="quantized layers", title_justify="left")
    for layer in report["layers"]:
        losses = [f"{layer[key]:.4g}" if layer[key] is not None else "–" for key in ("loss", "merge_loss")]
        table.add_row(layer["name"], "×".join(map(str, layer["shape"])), *losses, str(layer["tokens"]))
    return table
