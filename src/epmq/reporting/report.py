"""What a run did, in numbers: `report.json`, the model card and the table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from epmq.reporting.scores import score_title, shown_scores
from epmq.storage_settings import PLAIN, describe

if TYPE_CHECKING:
    from rich.table import Table

    from epmq.quantize_settings import Guidance

# Files of an output that tell of times, and so differ from run to run.
REPORT, PAGE, CARD = TIMED = ("report.json", "report.html", "README.md")
FLOAT16_MAX = 65504


def layer_notes(layers: Sequence[dict[str, Any]], guidance: Guidance) -> list[str]:
    """What a user should know of a report's layers that did not go as the settings ask for."""
    asked = {"strength": guidance.ridge, "damping": guidance.damping or guidance.ridge}
    raised = [
        f"{layer['name']}: {name} raised from {start:g} to {layer[name]:g} to factor its Hessian"
        for layer in layers
        for name, start in asked.items()
        if layer[name] not in (None, start)
    ]
    rounded = [
        f"{layer['name']}: {layer['rounded']} rows are rounded to nearest, which loses less there"
        for layer in layers
        if layer["rounded"]
    ]
    too_large = [
        f"{layer['name']}: inputs reach {layer['largest']:.3g}, more than float16 holds: load the checkpoint with "
        "dtype float32 or bfloat16"
        for layer in layers
        if layer["largest"] > FLOAT16_MAX and layer["name"].endswith(layer["group"])
    ]
    pooled = {layer["name"].rpartition(".")[0]: layer["tokens"] for layer in layers if layer.get("pooled")}
    none = sum(tokens == 0 for tokens in pooled.values())
    few = f"{len(pooled)} experts of mixtures saw too few tokens ({none} saw none): "
    few += "they are solved on others of their mixture, too"
    return raised + rounded + too_large + [few] * bool(pooled)


def block_of(name: str) -> str | None:
    """The block that a layer lies in, by its name; None outside the blocks."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    return None if last is None else ".".join(parts[: last + 1])


def layer_grid(layer: dict[str, Any], quantize: dict[str, Any]) -> str:
    """How a report's layer is stored, in a few words; `quantize` is of the recipe: old reports say no more."""
    grid = layer if "bits" in layer else quantize
    return "not rounded" if grid["bits"] == PLAIN else describe(grid)


def grid_text(quantize: dict[str, Any]) -> str:
    """What a recipe asks of the layers in the blocks, in a few words."""
    if quantize.get("budget") is not None or quantize.get("size") is not None:
        return "bits chosen layer by layer"
    return "unrounded targets" if quantize["bits"] == PLAIN else describe(quantize)


def stored_by_depth(report: dict[str, Any]) -> dict[str, dict[int, tuple[int, str]]]:
    """Layer's name within its block → number of the block, from 1 → bits, and how it is stored in a few words.

    Those outside the blocks are in none of it; nor is anything where a report does not say it layer by layer.
    """
    depths: dict[str, int] = {}
    stored: dict[str, dict[int, tuple[int, str]]] = {}
    for layer in report.get("layers", ()):
        block = block_of(layer["name"])
        if block is not None and "bits" in layer:
            depth = depths.setdefault(block, len(depths) + 1)
            stored.setdefault(layer["name"][len(block) + 1 :], {})[depth] = layer["bits"], layer_grid(layer, {})
    return stored


def size_text(size: int, bits: float | None) -> str:
    """The size of a whole model, and the bits that a weight takes, where that is known."""
    return f"{size / 1e6:.1f} MB" + ("" if bits is None else f", {bits:.2f} bits a weight")


def refine_line(refined: Mapping[str, Any]) -> str:
    """What became of training towards the experts, in a line."""
    losses, kept = refined["held_out"], refined["kept"]
    if not kept:
        return f"nothing, as none of {len(losses) - 1} epochs was better"
    return f"held-out loss {losses[0]:.4g} → {losses[kept]:.4g}, epoch {kept} of {len(losses) - 1}"


def export_line(export: dict[str, Any]) -> str:
    """What became of an export, in a line."""
    size = f", {export['bytes'] / 1e6:.1f} MB" if export["bytes"] else ""
    where = f": {export['output']}" if export.get("output") else ""
    found = export["verified"]
    if found is None:
        why = "not tried, as its runtime is not installed" if export["runtime"] else f"for {export['title']}"
        return f"{export['target']}{where}{size}; {why}"
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items() if name != "runtime")
    return f"{export['target']}{where}{size}; tried in {found['runtime']}: {facts}"


def block_losses(layers: Iterable[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Losses summed over the layers of each block: (block, merging deviation, quantization deviation).

    A layer outside the blocks goes by the module that it is in; those of which no loss was measured are left out.
    """
    losses: dict[str, tuple[float, float]] = {}
    for layer in layers:
        if layer["loss"] is None and layer["merge_loss"] is None:
            continue
        block = block_of(layer["name"]) or layer["name"].rpartition(".")[0] or layer["name"]
        merge, quantization = losses.get(block, (0.0, 0.0))
        losses[block] = merge + (layer["merge_loss"] or 0.0), quantization + (layer["loss"] or 0.0)
    return [(block, *pair) for block, pair in losses.items()]


def model_card(report: dict[str, Any]) -> str:
    """A short model card in Markdown with the Hub's front matter."""
    from huggingface_hub import ModelCard, ModelCardData

    quantize = report["recipe"]["quantize"]
    text, groups = grid_text(quantize), quantize["group_size"]
    if text == describe(quantize):  # in full for people who do not know it
        text = f"{quantize['bits']} bits, one scale a {'row' if groups == -1 else f'group of {groups}'}"
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["epmq", "merge", "compressed-tensors"]),
        template_str=(files("epmq.reporting") / "card.md.j2").read_text(encoding="utf-8"),
        report=report,
        score_title=score_title(report.get("metric")),
        scores=shown_scores(report),
        grid="" if quantize["method"] == "none" else text,
        size=size_text(report["bytes"], report["bits_per_weight"]) if report.get("bits_per_weight") else "",
    )
    return str(card)


def summary_table(report: dict[str, Any]) -> Table:
    """The table a run ends with."""
    from rich.table import Column, Table

    recipe, quantize = report["recipe"], report["recipe"]["quantize"]
    scores = Column(score_title(report.get("metric")), justify="right")
    table = Table("task", scores, title=report["output"] or "result", title_justify="left")
    for task, score in shown_scores(report).items():
        if task == "mean":
            table.add_section()
        table.add_row(task, score)
    if report.get("scores"):
        table.add_section()
    table.add_row("merge", recipe["merge"]["method"])
    table.add_row("quantize", quantize["method"])
    if quantize["method"] != "none":
        table.add_row("weights", grid_text(quantize))
    table.add_row("size", size_text(report["bytes"], report.get("bits_per_weight")))
    table.add_row("time", f"{sum(report['seconds'].values()):.1f} s")
    table.add_row("peak memory", f"{report['peak_memory_mb']:.0f} MB")
    if report.get("refine"):
        table.add_row("refine", refine_line(report["refine"]))
    for export in report.get("exports", ()):
        table.add_row("export", export_line(export))
    for note in report["notes"]:
        table.add_row("note", note)
    return table
