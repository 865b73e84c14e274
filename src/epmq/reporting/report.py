"""What a run did, in numbers: `report.json`, the model card and the tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epmq.pipeline.cost import Plan

# Files of an output that tell of times, and so differ from run to run.
REPORT, PAGE, CARD = TIMED = ("report.json", "report.html", "README.md")


def score_title(report: dict[str, Any]) -> str:
    """What the scores of a report are, as a heading; log-perplexities are shown as perplexities."""
    metric = report.get("metric")
    names = {"accuracy": "accuracy", "log_perplexity": "perplexity", "exact_match": "exact match"}
    return names[metric] if isinstance(metric, str) else "score"


def shown_scores(report: dict[str, Any], name: str = "mean") -> dict[str, str]:
    """The scores of a report as text, by task, and their mean under `name` (for perplexities the geometric one)."""
    from epmq.pipeline.evaluation import show_score

    scores, metric = report.get("scores") or {}, report.get("metric")
    if isinstance(metric, dict):
        shown = {task: f"{show_score(metric[task], score)} {metric[task]}" for task, score in scores.items()}
        mean = report.get("mean_score")
        return shown if mean is None else {**shown, name: f"{100 * mean:.1f}"}
    shown = {task: show_score(str(metric), score) for task, score in scores.items()}
    return {**shown, name: show_score(str(metric), report["mean_score"])} if scores else {}


def model_card(report: dict[str, Any]) -> str:
    """A short model card in Markdown with the Hub's front matter."""
    recipe, lines = report["recipe"], []
    quantize = recipe["quantize"]
    lines += ["---", "library_name: transformers", "tags:", "- epmq", "- merge", "- compressed-tensors", "---", ""]
    lines += [f"# {len(recipe['experts'])} experts in one model", ""]
    how = f"merged with `{recipe['merge']['method']}`"
    if quantize["method"] != "none":
        group = "row" if quantize["group_size"] == -1 else f"group of {quantize['group_size']}"
        how += f" and quantized with `{quantize['method']}` to {quantize['bits']} bits, one scale a {group}"
    lines += [f"`{recipe['base']}` and its fine-tunes, {how} by epmq {report['versions']['epmq']}.", ""]
    scores = shown_scores(report)
    lines += [f"| task | expert | {score_title(report)} |", "|---|---|---|"]
    for expert in recipe["experts"]:
        score = scores.get(expert["name"], "not evaluated")
        lines.append(f"| {expert['name']} | `{expert['model']}` | {score} |")
    lines += ["", "```python", "import epmq", "", 'model = epmq.load("PATH")', ""]
    lines += [f'model.answer("{recipe["experts"][0]["name"]}", [...])', "```", ""]
    lines += ["How it was made, layer by layer: `report.json`.", ""]
    return "\n".join(lines)


def summary_table(report: dict[str, Any]) -> Any:
    """The table a run ends with (a rich renderable)."""
    from rich.table import Table

    recipe = report["recipe"]
    table = Table(title=f"{report['output'] or 'result'}", title_justify="left")
    table.add_column("task")
    table.add_column(score_title(report), justify="right")
    for task, score in shown_scores(report).items():
        if task == "mean":
            table.add_section()
        table.add_row(task, score)
    if report.get("scores"):
        table.add_section()
    quantize = recipe["quantize"]
    table.add_row("merge", recipe["merge"]["method"])
    table.add_row("quantize", quantize["method"])
    if quantize["method"] != "none":
        table.add_row("bits", f"{quantize['bits']}, group size {quantize['group_size']}")
    table.add_row("size", f"{report['bytes'] / 1e6:.1f} MB")
    table.add_row("time", f"{sum(report['seconds'].values()):.1f} s")
    table.add_row("peak memory", f"{report['peak_memory_mb']:.0f} MB")
    for note in report["notes"]:
        table.add_row("note", note)
    return table


def plan_table(found: Plan) -> Any:
    """What a run will do and cost (a rich renderable)."""
    from rich.table import Table

    recipe, quantize = found.recipe, found.recipe.quantize
    table = Table(title="dry run: nothing was written", title_justify="left", show_header=False)
    table.add_row("merge", f"{recipe.merge.method}, {len(recipe.experts)} experts")
    table.add_row("quantize", quantize.method)
    table.add_row("model", f"{found.blocks} blocks, {found.layers} layers to quantize")
    if quantize.method != "none":
        table.add_row("bits", f"{quantize.bits}, group size {quantize.group_size}")
    if quantize.calibrates:
        table.add_row("calibration", f"about {found.tokens} tokens")
    table.add_section()
    for phase, seconds in found.seconds.items():
        table.add_row(phase, f"{seconds:.1f} s")
    table.add_row("time", f"{sum(found.seconds.values()):.1f} s, without evaluation")
    table.add_row("peak memory", f"{found.peak_memory_mb:.0f} MB")
    table.add_row("output", f"{found.output_bytes / 1e6:.1f} MB; {found.disk_bytes / 1e6:.1f} MB while it is written")
    for note in found.notes:
        table.add_row("note", note)
    return table
