"""Look into a checkpoint without loading it: headers, config and report."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.table import Table

from epmq.errors import error_context
from epmq.files import read_json
from epmq.models.checkpoint import (
    FLOATS,
    Checkpoint,
    architecture_of,
    bits_per_weight,
    byte_size,
    count_parameters,
    resolve,
)
from epmq.models.multitask import HEADS
from epmq.reporting.report import REPORT, block_losses, block_of, layer_grid, size_text
from epmq.reporting.scores import score_title, shown_scores
from epmq.storage_settings import describe

# What stands for the weight of a layer in compressed-tensors' checkpoints, beside `weight`, and in GPTQ's and AWQ's.
LEAVES = tuple(
    f"weight_{what}" for what in ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale", "scale_inv")
)
GPTQ_LEAVES = ("qweight", "qzeros", "scales", "g_idx")
# Forms of packed weights of which it is known how many numbers a word holds; others are not counted.
COUNTED = (None, "compressed-tensors", "gptq", "awq", "fp8")
PARTS = BLOCKS, TABLES, OUTSIDE, REST = (
    "layers of the blocks",
    "tables of tokens, output layer",
    "layers outside the blocks",
    "all else",
)


@dataclass(frozen=True)
class Weight:
    """One weight of a model with all tensors that stand for it in a checkpoint.

    Attributes:
        name: of the weight, as on disk.
        stored: in a few words, such as `4 bits, a row`, or a dtype.
        part: one of `PARTS`.
        parameters: None where they cannot be counted; 0 of what is no parameter.
        tensors: how many stand for it.
        bytes: of these.
    """

    name: str
    stored: str
    part: str
    parameters: int | None
    tensors: int
    bytes: int


def contents(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, from its headers.

    Returns:
        `tensors`: name → (dtype on disk, shape, bytes); `quantization`: name of each config group → its weight settings
        and its format; `weights`: see `Weight`; `parameters`, `bytes`, `bits_per_weight`: of the whole model, None
        where parameters cannot be counted; `tasks`: names of the heads; `report`: content of report.json, or None;
        `architecture`.

    Raises:
        FileNotFoundError, ValueError: not a checkpoint; the file is named.
    """
    checkpoint = Checkpoint(resolve(path))
    specs = {name: checkpoint.spec(name) for name in checkpoint.names}
    with error_context(checkpoint.path / "config.json", "quantization_config is not as compressed-tensors writes it"):
        quantization = checkpoint.config.get("quantization_config") or {}
        groups = {
            name: {**(group.get("weights") or {}), "format": group.get("format") or quantization.get("format")}
            for name, group in (quantization.get("config_groups") or {}).items()
        }
        weights = list(_weights(checkpoint, quantization))
    report = checkpoint.path / REPORT
    sizes, counts = [weight.bytes for weight in weights], [weight.parameters for weight in weights]
    parameters = None if None in counts else sum(count or 0 for count in counts)
    return {
        "architecture": architecture_of(checkpoint.config) or "unknown",
        "tensors": {name: (dtype, list(shape), byte_size((dtype, shape))) for name, (dtype, shape) in specs.items()},
        "quantization": groups,
        "weights": weights,
        "parameters": parameters,
        "bytes": sum(sizes),
        "bits_per_weight": bits_per_weight(sum(sizes), parameters),
        "tasks": sorted(file.stem for file in (checkpoint.path / HEADS).glob("*.safetensors")),
        "report": read_json(report) if report.exists() else None,
    }


# --- which tensors stand for which weight --------------------------------------------------------------------------


def _weights(checkpoint: Checkpoint, quantization: dict[str, Any]) -> Iterator[Weight]:
    """The weights of a checkpoint, whoever wrote it."""
    vocabularies = set(_vocabularies(checkpoint.config))
    members: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names:
        members[_owner(checkpoint, name)].append(name)
    for owner, names in members.items():
        leaves = {name.rpartition(".")[2]: name for name in names}
        size = sum(byte_size(checkpoint.spec(name)) for name in names)
        if len(names) == 1 and owner in checkpoint:
            dtype, shape = spec = checkpoint.spec(owner)
            table = len(shape) == 2 and shape[0] in vocabularies and block_of(owner) is None
            counted = dtype in FLOATS or quantization.get("quant_method") in COUNTED
            count = count_parameters([spec]) if counted else None
            yield Weight(owner, dtype, TABLES if table else REST, count, 1, size)
            continue
        shape = _shape(checkpoint, leaves, quantization)
        stored = _stored(checkpoint, leaves, shape, quantization)
        known = not prod(shape) or quantization.get("quant_method") in COUNTED
        table = shape[0] in vocabularies or not prod(shape)  # scales alone are those of what is tied to a table
        part = BLOCKS if block_of(owner) is not None else TABLES if table else OUTSIDE
        yield Weight(owner, stored, part, prod(shape) if known else None, len(names), size)


def _owner(checkpoint: Checkpoint, name: str) -> str:
    """The weight that a tensor stands for, or belongs to."""
    layer, _, leaf = name.rpartition(".")
    packed = leaf in LEAVES or (leaf in GPTQ_LEAVES and f"{layer}.qweight" in checkpoint)
    return f"{layer}.weight" if packed else name


def _shape(checkpoint: Checkpoint, leaves: dict[str, str], quantization: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a quantized weight; (0, 0) where its codes are another one's, to which it is tied."""
    if "weight_shape" in leaves:
        return tuple(checkpoint.tensor(leaves["weight_shape"]).tolist())
    if "weight" in leaves:
        return checkpoint.shape(leaves["weight"])
    codes = leaves.get("weight_packed", leaves.get("qweight"))
    if codes is None:
        return 0, 0
    dtype, (rows, columns) = checkpoint.spec(codes)
    numbers = 8 * byte_size((dtype, (1, 1))) // _config_bits(quantization)  # in a word
    # GPTQ packs along the inputs, which come first there; AWQ along the outputs, which come second.
    along_rows = "qweight" in leaves and quantization.get("quant_method") != "awq"
    return (rows * numbers, columns) if along_rows else (rows, columns * numbers)


def _config_bits(quantization: dict[str, Any]) -> int:
    """Bits of the weights, where the config alone says them."""
    groups = list((quantization.get("config_groups") or {}).values())
    return int(groups[0]["weights"]["num_bits"] if groups else quantization["bits"])


def _stored(
    checkpoint: Checkpoint, leaves: dict[str, str], shape: tuple[int, ...], quantization: dict[str, Any]
) -> str:
    """How a quantized weight is stored, from its tensors: bits, groups, zero points."""
    if not prod(shape):
        return "scales for what is tied"
    if "qweight" in leaves:
        return describe({"bits": _config_bits(quantization), "group_size": quantization.get("group_size")})
    if "weight" in leaves:
        dtype, _ = checkpoint.spec(leaves["weight"])
        if dtype != "I8":
            return dtype
        bits = 8
    else:
        dtype, (_, words) = checkpoint.spec(leaves["weight_packed"])
        bits = 8 * byte_size((dtype, (words,))) // shape[1]
    scale = checkpoint.shape(leaves["weight_scale"]) if "weight_scale" in leaves else ()
    groups = scale[1] if len(scale) == 2 else 1
    width = -1 if groups == 1 else shape[1] // groups
    return describe({"bits": bits, "group_size": width, "symmetric": "weight_zero_point" not in leaves})


def _vocabularies(config: dict[str, Any]) -> Iterator[int]:
    """Sizes of the vocabularies that a config tells of, in any part of it."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _vocabularies(value)
        elif name == "vocab_size" and isinstance(value, int):
            yield value


# --- tables --------------------------------------------------------------------------------------------------------


def inspection_tables(path: str | Path, layers: bool = False) -> list[Table]:
    """Rich tables for the terminal: overview, sizes by part and, if asked, every quantized layer."""
    checkpoint = contents(path)
    with error_context(path, "config.json or report.json is not as epmq writes it"):
        tables = [_overview(path, checkpoint), _sizes(checkpoint)]
        if report := checkpoint["report"]:
            tables += [table for table in (_scores(report), _depth(report)) if table.row_count]
            tables += [_layers(report)] if layers else []
        elif layers:
            tables.append(_stored_weights(checkpoint["weights"]))
    return tables


def _overview(path: str | Path, checkpoint: dict[str, Any]) -> Table:
    table = Table(title=str(path), title_justify="left", show_header=False)
    table.add_row("architecture", checkpoint["architecture"])
    for name, group in checkpoint["quantization"].items():
        table.add_row(f"weights, {name}", _group_text(group))
    if not checkpoint["quantization"]:
        table.add_row("weights", "not packed")
    table.add_row("tasks", ", ".join(checkpoint["tasks"]) or "no heads")
    parameters = checkpoint["parameters"]
    table.add_row("parameters", "unknown" if parameters is None else f"{parameters:,}".replace(",", " "))
    table.add_row("size", size_text(checkpoint["bytes"], checkpoint["bits_per_weight"]))
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


def _group_text(group: dict[str, Any]) -> str:
    """A config group in words."""
    if "num_bits" not in group:
        return str(group["format"])
    symmetric = "symmetric" if group.get("symmetric", True) else "asymmetric"
    return f"{group['num_bits']} bits, {symmetric}, group size {group.get('group_size') or 'a row'}, {group['format']}"


def _sizes(checkpoint: dict[str, Any]) -> Table:
    """Sizes by part and by how that is stored, and the three largest weights."""
    table = Table("part", "stored in", "weights", "size", "share", title="sizes", title_justify="left")
    weights: Sequence[Weight] = checkpoint["weights"]
    counts, sizes, total = Counter[tuple[str, str]](), Counter[tuple[str, str]](), checkpoint["bytes"] or 1
    for weight in weights:
        counts[weight.part, weight.stored] += 1
        sizes[weight.part, weight.stored] += weight.bytes
    for key in sorted(sizes, key=lambda key: (PARTS.index(key[0]), -sizes[key])):
        table.add_row(*key, str(counts[key]), f"{sizes[key] / 1e6:.1f} MB", f"{100 * sizes[key] / total:.0f} %")
    table.add_section()
    for weight in sorted(weights, key=lambda weight: -weight.bytes)[:3]:
        share = f"{100 * weight.bytes / total:.0f} %"
        table.add_row(weight.name, weight.stored, "", f"{weight.bytes / 1e6:.1f} MB", share)
    return table


def _scores(report: dict[str, Any]) -> Table:
    table = Table("task", score_title(report.get("metric")), title="scores", title_justify="left")
    for task, score in shown_scores(report).items():
        table.add_row(task, score)
    return table


def _depth(report: dict[str, Any]) -> Table:
    """Losses by depth, as bars: what the merged weights are off the target, and what the codes are."""
    table = Table("block", "merging", "", "quantization", "", title="deviation by depth", title_justify="left")
    blocks = block_losses(report["layers"])
    most = max((loss for _, *losses in blocks for loss in losses), default=0.0)
    for block, *losses in blocks:
        table.add_row(block, *(cell for loss in losses for cell in (f"{loss:.3g}", _bar(loss, most))))
    return table


def _bar(value: float, most: float) -> str:
    """A bar of up to 20 characters, in eighths."""
    eighths = round(160 * value / most) if most > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _layers(report: dict[str, Any]) -> Table:
    titles = ("layer", "shape", "stored in", "loss", "merge loss", "tokens")
    table = Table(*titles, title="quantized layers", title_justify="left")
    for layer in report["layers"]:
        losses = [f"{layer[key]:.4g}" if layer[key] is not None else "–" for key in ("loss", "merge_loss")]
        stored = layer_grid(layer, report["recipe"]["quantize"])
        table.add_row(layer["name"], "×".join(map(str, layer["shape"])), stored, *losses, str(layer["tokens"] or "–"))
    return table


def _stored_weights(weights: Sequence[Weight]) -> Table:
    """Every quantized weight of a checkpoint that has no report."""
    table = Table("weight", "stored in", "parameters", "size", title="quantized weights", title_justify="left")
    for weight in weights:
        if weight.tensors > 1:
            count = "–" if weight.parameters is None else str(weight.parameters)
            table.add_row(weight.name, weight.stored, count, f"{weight.bytes / 1e6:.2f} MB")
    return table
