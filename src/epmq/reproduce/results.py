"""The rows of a table, ours beside the published ones: as data, as Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epmq.reporting.scores import gap_recovered
from epmq.reproduce.tables import Row, Table

# Tasks that a terminal has room for beside the rest.
WIDE = 8


def row_result(table: Table, row: Row, report: Mapping[str, Any]) -> dict[str, Any]:
    """One finished row.

    Args:
        table: the table.
        row: which row.
        report: `scores` and `mean_score` as shares of 1 and `seconds` by phase; where a checkpoint was written also
            `bytes`, `peak_memory_mb` and `notes`, as in a run's report.

    Returns:
        plain values; scores are 0 to 100.
    """
    scores = {task: round(100 * score, 4) for task, score in report["scores"].items()}
    return {
        "row": row.name,
        "merge": row.merge,
        "method": row.method,
        "bits": row.bits,
        "group_size": None if row.bits is None else table.group_size,
        "metric": report["metric"],
        "scores": scores,
        "mean": round(100 * report["mean_score"], 4),
        "bytes": report.get("bytes"),
        "seconds": report["seconds"],
        "peak_memory_mb": report.get("peak_memory_mb"),
        "notes": report.get("notes", []),
        "date": report["date"],
    }


def with_published(table: Table, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All rows of the table in order, ours with what was published for them, then what was published alone.

    Adds to each row `published` (a list, as in the table's YAML), `published_mean` (the first one's), `gap_recovered`
    and `published_gap_recovered`, shares of 1 or None.
    """
    found = {result["row"]: dict(result) for result in results}
    rows, shown = [], set[str]()
    for row in table.rows():
        figures = [figure.model_dump(mode="json") for figure in table.figures(row)]
        if row.name in found or figures:
            blank = {"row": row.name, "merge": row.merge, "method": row.method, "bits": row.bits}
            rows.append({**found.get(row.name, blank), "published": figures})
            shown.add(row.name)
    for figure in table.published:
        row = Row(figure.merge, figure.method, figure.bits)
        if row.name not in shown:
            rows.append({**figure.model_dump(include={"merge", "method", "bits"}), "row": row.name})
            rows[-1]["published"] = [figure.model_dump(mode="json")]
            shown.add(row.name)
    for entry in rows:
        entry["published_mean"] = entry["published"][0]["mean"] if entry["published"] else None
    for field, name in (("mean", "gap_recovered"), ("published_mean", "published_gap_recovered")):
        means = {(entry["merge"], entry["method"], entry["bits"]): entry.get(field) for entry in rows}
        for entry in rows:
            ours = entry.get(field)
            gptq, experts = means.get((entry["merge"], "gptq", entry["bits"])), means.get((None, "experts", None))
            entry[name] = None
            if ours is not None and gptq is not None and experts is not None and entry["method"] != "gptq":
                entry[name] = gap_recovered(ours, gptq, experts)
    return rows


def cells(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table, as text; tasks have a column each."""
    headings = ["merge", "method", "bits", *tasks, "mean", "published", "gap recovered", "published", "MB", "s"]
    found = []
    for entry in rows:
        scores, bytes_, seconds = entry.get("scores") or {}, entry.get("bytes"), entry.get("seconds")
        method = {"none": "full precision"}.get(entry["method"], entry["method"])
        line = [entry["merge"] or "", method, "" if entry["bits"] is None else str(entry["bits"])]
        line += [_score(scores.get(task)) for task in tasks]
        line += [_score(entry.get("mean")), _score(entry["published_mean"])]
        line += [_share(entry["gap_recovered"]), _share(entry["published_gap_recovered"])]
        line += ["" if bytes_ is None else f"{bytes_ / 1e6:.1f}"]
        line += ["" if seconds is None else f"{sum(seconds.values()):.0f}"]
        found.append(line)
    return headings, found


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def markdown(content: Mapping[str, Any]) -> str:
    """`table.md`: every row with every task, what was published, and where it stands."""
    headings, lines = cells(content["rows"], content["tasks"])
    text = [f"# {content['title']}", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    text += [f"| {' | '.join(line)} |" for line in lines]
    text += ["", "Scores are 0 to 100. Gap recovered: (method − GPTQ) / (experts − GPTQ) at the same merge and bits."]
    if content["limit"] is not None:
        text.append(f"At most {content['limit']} examples a task: a quick look, no match for what is published.")
    sources = {figure["source"]: None for entry in content["rows"] for figure in entry["published"]}
    text += ["", *(f"* published: {source}" for source in sources), ""]
    machine = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    text += [f"{content['date']}; {machine}; {content['hardware']}", ""]
    return "\n".join(text)


def terminal_table(content: Mapping[str, Any]) -> Any:
    """The same for the terminal (a rich renderable); tasks are left out where there are too many."""
    from rich.table import Table as Shown

    tasks = content["tasks"] if len(content["tasks"]) <= WIDE else []
    headings, lines = cells(content["rows"], tasks)
    shown = Shown(title=content["title"], title_justify="left")
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if number < 2 else "right", no_wrap=number >= 2)
    for line, entry, after in zip(lines, content["rows"], [*content["rows"][1:], None]):
        new = after is not None and (after["merge"], after["bits"]) != (entry["merge"], entry["bits"])
        shown.add_row(*line, end_section=new)
    return shown
