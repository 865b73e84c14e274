"""The rows of a table, ours beside the published ones: as data, as Markdown and in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable

from epmq.reporting.scores import gap_recovered
from epmq.reproduce.tables import Row, Table

# Columns of tasks that a terminal has room for.
MOST_TASKS = 8


def row_result(table: Table, row: Row, report: Mapping[str, Any]) -> dict[str, Any]:
    """One finished row of a table.

    Args:
        report: `scores` and `mean_score` as shares of 1 and `seconds` by phase; where a checkpoint was written also
            `bytes`, `bits_per_weight`, `peak_memory_mb` and `notes`, as in a run's report.

    Returns:
        plain values; scores are 0 to 100.
    """
    return {
        "row": row.name,
        "merge": row.merge,
        "method": row.method,
        "bits": row.bits,
        "group_size": None if row.bits is None else table.group_size,
        "metric": report["metric"],
        "scores": {task: round(100 * score, 4) for task, score in report["scores"].items()},
        "mean": round(100 * report["mean_score"], 4),
        "bytes": report.get("bytes"),
        "bits_per_weight": report.get("bits_per_weight"),
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
    by_name = {result["row"]: result for result in results}
    entries: dict[str, dict[str, Any]] = {}
    for row in table.rows():
        figures = [figure.model_dump(mode="json") for figure in table.published if figure.row == row]
        if row.name in by_name or figures:
            blank = {"row": row.name, "merge": row.merge, "method": row.method, "bits": row.bits}
            entries[row.name] = {**by_name.get(row.name, blank), "published": figures}
    for figure in table.published:
        alone = {**figure.model_dump(include={"merge", "method", "bits"}), "row": figure.row.name}
        entries.setdefault(figure.row.name, {**alone, "published": [figure.model_dump(mode="json")]})
    rows = list(entries.values())
    for entry in rows:
        entry["published_mean"] = entry["published"][0]["mean"] if entry["published"] else None
    for field, name in (("mean", "gap_recovered"), ("published_mean", "published_gap_recovered")):
        means = {(entry["merge"], entry["method"], entry["bits"]): entry.get(field) for entry in rows}
        experts = means.get((None, "experts", None))
        for entry in rows:
            mean, gptq = entry.get(field), means.get((entry["merge"], "gptq", entry["bits"]))
            entry[name] = None
            if mean is not None and gptq is not None and experts is not None and entry["method"] != "gptq":
                entry[name] = gap_recovered(mean, gptq, experts)
    return rows


def cells(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table, as text; tasks have a column each."""
    headings = ["merge", "method", "bits", *tasks, "mean", "published", "gap recovered", "published", "MB"]
    headings += ["bits a weight", "s"]
    lines = []
    for entry in rows:
        scores, size, seconds = entry.get("scores") or {}, entry.get("bytes"), entry.get("seconds")
        line = [entry["merge"], "full precision" if entry["method"] == "none" else entry["method"], entry["bits"]]
        line += [_number(score) for score in (*map(scores.get, tasks), entry.get("mean"), entry["published_mean"])]
        shares = entry["gap_recovered"], entry["published_gap_recovered"]
        line += [None if share is None else f"{100 * share:.0f} %" for share in shares]
        bits = entry.get("bits_per_weight")
        line += [_number(size and size / 1e6), None if bits is None else f"{bits:.2f}"]
        line += [None if seconds is None else f"{sum(seconds.values()):.0f}"]
        lines.append(["" if cell is None else str(cell) for cell in line])
    return headings, lines


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


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


def terminal_table(content: Mapping[str, Any]) -> RichTable:
    """The same for the terminal; tasks are left out where there are too many."""
    tasks = content["tasks"] if len(content["tasks"]) <= MOST_TASKS else []
    headings, lines = cells(content["rows"], tasks)
    table = RichTable(title=content["title"], title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=number >= 2)
    groups = [(entry["merge"], entry["bits"]) for entry in content["rows"]]
    for line, group, following in zip(lines, groups, [*groups[1:], groups[-1]]):
        table.add_row(*line, end_section=following != group)
    return table
