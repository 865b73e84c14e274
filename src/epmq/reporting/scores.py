"""What scores are, and how they are shown."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# Metrics of which 1 is the best: tasks that are scored by them have a mean, whichever it is in each.
SHARES = ("accuracy", "f1", "exact_match", "spearman", "pearson")
# … of which those are correlations, and no share of anything.
CORRELATIONS = ("spearman", "pearson")
_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "exact_match": "exact match",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "mse": "mean squared error",
    "log_perplexity": "perplexity",
}


def score_report(metrics: Mapping[str, str], scores: Mapping[str, float]) -> dict[str, Any]:
    """Scores as a report holds them.

    Args:
        metrics, scores: task → name of its metric, and score in it.

    Returns:
        `metric`: its name, or task → name where tasks differ; `scores`; `mean_score`: None where tasks differ and some
        metrics are not among `SHARES`.
    """
    named = {task: metrics[task] for task in scores}
    used = set(named.values())
    mean = sum(scores.values()) / len(scores) if len(used) == 1 or used <= set(SHARES) else None
    return {"metric": used.pop() if len(used) == 1 else named, "scores": scores, "mean_score": mean}


def score_title(metric: object) -> str:
    """A metric as a heading; log-perplexities are shown as perplexities, and several metrics are a score."""
    return _TITLES.get(metric, "score") if isinstance(metric, str) else "score"


def show_score(metric: str, value: float) -> str:
    """A score for people: shares in percent, log-perplexities as perplexities, a correlation times 100."""
    if metric == "log_perplexity":
        return f"{math.exp(value):.2f}"
    if metric == "mse":
        return f"{value:.4g}"
    return f"{100 * value:.1f}" if metric in CORRELATIONS else f"{100 * value:.1f} %"


def shown_scores(report: Mapping[str, Any]) -> dict[str, str]:
    """The scores of a report as text, by task, and their `mean`, if there is one (of perplexities the geometric)."""
    scores, metric, mean = report.get("scores") or {}, report.get("metric"), report.get("mean_score")
    if isinstance(metric, dict):
        texts = {
            task: f"{show_score(metric[task], score)} {score_title(metric[task])}" for task, score in scores.items()
        }
        return texts if mean is None else {**texts, "mean": f"{100 * mean:.1f}"}
    return {task: show_score(str(metric), score) for task, score in {**scores, "mean": mean}.items()} if scores else {}


def gap_recovered(method: float, gptq: float, experts: float) -> float | None:
    """(method − GPTQ on the merged model) / (experts − GPTQ on the merged model); None where there is no gap."""
    return None if experts == gptq else (method - gptq) / (experts - gptq)


def score_table(columns: Mapping[str, Mapping[str, Any]]) -> "Table":
    """Scores side by side: title of a column → what an evaluation gave; all of the same tasks."""
    from rich.table import Table

    scores = [shown_scores(column) for column in columns.values()]
    title = score_title(next(iter(columns.values()))["metric"])
    table = Table("task", *columns, title=title, title_justify="left")
    for task in scores[0]:
        if task == "mean":
            table.add_section()
        table.add_row(task, *(column[task] for column in scores))
    return table
