"""Models side by side: tasks down, models across."""

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table

from epmq.reporting.scores import CORRELATIONS, SHARES, score_report, score_title, shown_scores

# Of a model, or of experts together: `metric`, `scores` and `mean_score` as in a report, `bytes` of all weights that
# have to be shipped, and `bits_per_weight`.
Measured = dict[str, Any]
FIELDS = ("metric", "scores", "mean_score", "bytes", "bits_per_weight")
PERCENT = " %"


def measured(report: Mapping[str, Any], **fields: Any) -> Measured:
    """What a table shows of a report; `fields` are those that it lacks."""
    content = {**report, **fields}
    return {name: content.get(name) for name in FIELDS}


def measured_accuracy(accuracy: Mapping[str, float], **fields: Any) -> Measured:
    """The same of accuracies by task."""
    return measured(score_report(dict.fromkeys(accuracy, "accuracy"), accuracy), **fields)


def comparison_table(columns: Mapping[str, Measured], settings: str) -> Table:
    """Scores by task and on average, size and bits a weight; `settings` says in the title what all have in common."""
    first = next(iter(columns.values()))
    metric = first["metric"]
    percent = isinstance(metric, str) and metric in SHARES and metric not in CORRELATIONS
    headings = [Column(name, justify="right", overflow="fold") for name in columns]
    title = f"{score_title(metric)}{' in %' if percent else ''}, {settings}"
    table = Table("task", *headings, title=title, title_justify="left")
    shown = [shown_scores(column) for column in columns.values()]
    for task in dict.fromkeys(task for scores in shown for task in scores):
        if task == "mean":
            table.add_section()
        cells = (scores.get(task, "–") for scores in shown)
        table.add_row(task, *(cell.removesuffix(PERCENT) if percent else cell for cell in cells))
    bits = [column["bits_per_weight"] for column in columns.values()]
    table.add_row("MB", *(f"{column['bytes'] / 1e6:.1f}" for column in columns.values()))
    table.add_row("bits a weight", *("–" if one is None else f"{one:.1f}" for one in bits))
    return table
