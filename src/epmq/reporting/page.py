"""`report.html`: one run or several as a page that needs no network, no script, and fits a phone."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from epmq.reporting.figures import draw_figures
from epmq.reporting.report import size_text
from epmq.reporting.runs import Run, Scores, common_score_title, gap, labels, reference
from epmq.storage_settings import without_defaults

# Fields of a report that tell how the run was made.
SETTINGS = ("date", "versions", "hardware", "seconds", "peak_memory_mb", "recipe")
# (merge, method, bits) → published mean
Published = Mapping[tuple[str, str, int | None], float]


class Table(NamedTuple):
    """Text of a table; `own` is the number of the row that stands out."""

    titles: list[str]
    rows: list[list[str]]
    own: int | None = None


def render_page(
    runs: Sequence[Run], *, experts: Scores | None = None, published: Published | None = None, title: str | None = None
) -> str:
    """The page of some runs, as HTML.

    Args:
        runs: at least one, held against GPTQ of the same merge on the same grid and the same merge in full precision.
        experts: what the experts score, each on its own task.
        published: published means, in the same unit as the runs' means.
        title: heading; by default it says what was merged.
    """
    names = labels(runs)
    named = list(zip(names, runs))
    figures, missing = draw_figures(runs, names, experts)
    loader = FunctionLoader(packaged_text)
    environment = Environment(loader=loader, autoescape=True, finalize=_escaped, undefined=StrictUndefined)
    text = environment.get_template("page.html.j2").render(
        heading=title or _heading(runs),
        lead=_lead(runs),
        summary=_summary(runs, names, experts, published or {}),
        remarks=_remarks(runs, experts),
        tasks=_tasks(runs, names, experts),
        figures=figures,
        missing="; ".join(missing),
        notes=[f"{name}: {note}" if runs[1:] else note for name, run in named for note in run.report.get("notes", ())],
        settings=[(name, _settings(run)) for name, run in named if run.report],
    )
    return text + "\n"


def packaged_text(name: str) -> str:
    """A template or stylesheet of this package, without line breaks and the space at both ends of its lines."""
    text = (files("epmq.reporting") / name).read_text(encoding="utf-8")
    return "".join(line.strip() for line in text.splitlines())


def _escaped(value: object) -> Markup:
    """Text as HTML; a quote becomes `&quot;`, where jinja would write a number."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def _heading(runs: Sequence[Run]) -> str:
    tasks = max((len(run.scores) or len(run.report.get("recipe", {}).get("experts", ())) for run in runs), default=0)
    return f"{tasks} experts in one model" + (f": {len(runs)} runs" if len(runs) > 1 else "")


def _lead(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return ", ".join(sorted({run.report["recipe"]["base"] for run in runs if run.report}))
    [run] = runs
    size = "" if run.bytes is None else f", {size_text(run.bytes, run.bits_per_weight)}"
    name = run.report["recipe"]["base"] if run.report else run.name
    return f"{name}: merged by {run.merge}, {run.title}, {run.weights}{size}"


def _summary(runs: Sequence[Run], names: Sequence[str], experts: Scores | None, published: Published) -> Table:
    """One row a run: the mean, how it compares, and what it costs. Columns without any content are left out."""
    gptq = [reference(run, runs, "gptq") if run.bits is not None else None for run in runs]
    merged = [reference(run, runs, "none") for run in runs]
    gaps = [gap(run, runs, experts) for run in runs]
    means = [published.get((run.merge, run.method, run.bits)) for run in runs]
    columns: dict[str, list[str | None]] = {
        "model": list(names),
        f"mean {common_score_title(runs)}": [None if run.mean is None else run.show(run.mean) for run in runs],
        "gap recovered": [None if share is None else _signed(100 * share, 0, " %") for share in gaps],
        "to GPTQ": [_to_reference(run, other) for run, other in zip(runs, gptq)],
        "to the merged model": [_to_reference(run, other) for run, other in zip(runs, merged)],
        "published": [None if mean is None else run.show(mean) for run, mean in zip(runs, means)],
        "to published": [None if mean is None else _change(run, mean) for run, mean in zip(runs, means)],
        "weights": [run.weights for run in runs],
        "MB": ["–" if run.bytes is None else f"{run.bytes / 1e6:.1f}" for run in runs],
        "bits a weight": [None if run.bits_per_weight is None else f"{run.bits_per_weight:.2f}" for run in runs],
        "time": [f"{sum(run.report['seconds'].values()):.0f} s" if run.report else None for run in runs],
    }
    columns = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
    rows = [["–" if cell is None else cell for cell in row] for row in zip(*columns.values())]
    own = next((i for i, run in enumerate(runs) if run.method == "expert_guided"), None) if len(runs) > 1 else None
    return Table(list(columns), rows, own)


def _to_reference(run: Run, other: Run | None) -> str | None:
    return None if other is None or other is run else _change(run, other.mean)


def _change(run: Run, mean: float | None) -> str:
    """How far a run's mean is from another one, with a sign: in points, or of a perplexity in percent."""
    if run.mean is None or mean is None:
        return "–"
    if run.metric == "log_perplexity":
        return _signed(100 * math.expm1(run.mean - mean), 1, " %", "+")
    if run.metric == "mse":
        return _signed(run.mean - mean, 4, "", "+")
    return _signed(100 * (run.mean - mean), 1, "", "+")


def _signed(value: float, digits: int, unit: str, plus: str = "") -> str:
    """A number with a minus that is one, and none before a zero."""
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}{unit}".replace("-", "−")


def _remarks(runs: Sequence[Run], experts: Scores | None) -> Iterator[str]:
    """What is said below the summary."""
    if experts is not None and experts.mean is not None:
        yield f"The experts, each on its own task: {runs[0].show(experts.mean)}."
    if not any(run.scores for run in runs):
        yield "Nothing was scored: the recipe names no evaluation data."
    elif all(run.mean is None for run in runs):
        yield "Tasks are scored in different ways, so there is no mean."


def _tasks(runs: Sequence[Run], names: Sequence[str], experts: Scores | None) -> Table:
    """One row a run that was scored, one column a task."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores))
    rows = [
        [name, *(run.show(run.scores.get(task), task) for task in tasks)]
        for name, run in zip(names, runs)
        if run.scores
    ]
    if rows and experts is not None:
        rows.append(["experts", *(runs[0].show(experts.scores.get(task), task) for task in tasks)])
    return Table(["model", *tasks], rows)


def _settings(run: Run) -> str:
    """Recipe, versions, hardware and cost of a run that has a report, as JSON."""
    shown = {field: run.report[field] for field in SETTINGS}
    recipe = {**shown["recipe"], "quantize": without_defaults(shown["recipe"]["quantize"])}
    return json.dumps({**shown, "recipe": recipe}, indent=2, ensure_ascii=False)
