"""`report.html`: one run or several as a page that needs no network, no script, and fits a phone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from epmq.errors import InputError, MissingError, error_context
from epmq.pipeline.evaluation import gap_recovered, show_score
from epmq.reporting import charts
from epmq.reporting.report import REPORT

TITLES = {"none": "merged", "rtn": "RTN", "gptq": "GPTQ", "e_pmq": "E-PMQ", "expert_guided": "expert-guided"}
# Colours and forms of the methods in every chart (see `epmq.reporting.charts`).
FORMS = {"merged": 6, "RTN": 4, "GPTQ": 0, "E-PMQ": 3, "expert-guided": 1, "experts": 2}
METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "log_perplexity": "perplexity"}

_STYLE = (
    ":root{color-scheme:light dark;--back:#fff;--text:#1c1e21;--dim:#667;--edge:#dde}"
    "@media(prefers-color-scheme:dark){:root{--back:#16181b;--text:#e6e7e9;--dim:#9aa;--edge:#33373c}}"
    "*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:1.2rem 1rem 3rem;background:var(--back);"
    "color:var(--text);font:15px/1.5 system-ui,sans-serif}h1{font-size:1.45rem;line-height:1.25;margin:.2rem 0}"
    "h2{font-size:1.1rem;margin:2rem 0 .5rem}p{margin:.4rem 0}.dim,figcaption{color:var(--dim)}"
    "figcaption,.small{font-size:.85rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}"
    "th,td{padding:.28rem .6rem;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap;"
    "font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}th{font-weight:600}"
    "tr.own td{font-weight:600}.figures{display:grid;gap:1.2rem 2rem;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}figure{margin:0}"
    "figcaption b{color:var(--text)}ul{padding-left:1.2rem}details{margin:.5rem 0}summary{cursor:pointer}"
    "pre{overflow-x:auto;font-size:.8rem;border:1px solid var(--edge);padding:.6rem}"
)


@dataclass(frozen=True)
class Run:
    """What a page shows of one run.

    Attributes:
        name: what it is called where its settings do not tell it apart.
        merge: method and settings of the merge.
        method: of quantization; "none" for a merge in full precision.
        bits, group_size, symmetric: the grid; None in full precision.
        metric: a name of `epmq.pipeline.evaluation.METRICS`, or None if nothing was scored or tasks differ in it.
        scores: task → score.
        mean: of the scores; None where there is none.
        bytes: of all weights.
        report: the whole report, or {} for a row of a results file.
    """

    name: str
    merge: str
    method: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    metric: str | None
    scores: dict[str, float]
    mean: float | None
    bytes: int | None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int | None, int | None, bool | None]:
        return self.bits, self.group_size, self.symmetric

    @property
    def weights(self) -> str:
        """The grid in words."""
        if self.bits is None:
            return "full precision"
        groups = "a row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits} bits, {groups}" + ("" if self.symmetric else ", asymmetric")

    def show(self, score: float | None) -> str:
        """A score as text; a dash where there is none."""
        return "–" if score is None else show_score(self.metric or "accuracy", score)


@dataclass(frozen=True)
class Scores:
    """Scores that runs are held against, such as the experts', each on its own task."""

    scores: dict[str, float]
    mean: float | None


def run_of(report: dict[str, Any]) -> Run:
    """A run from its report.

    Raises:
        KeyError: a field is missing.
    """
    quantize, merge = report["recipe"]["quantize"], report["recipe"]["merge"]
    given = {name: value for name, value in merge.items() if value is not None and name != "method"}
    default = {"trim": "model", "combine": "task_arithmetic", "scaling": 1.0 if merge["method"] == "ties" else 0.3}
    told = ", ".join(f"{name} {value}" for name, value in given.items() if default.get(name) != value)
    quantized, metric = quantize["method"] != "none", report.get("metric")
    return Run(
        name=Path(report["output"] or "run").name,
        merge=merge["method"] + (f" ({told})" if told else ""),
        method=quantize["method"],
        bits=quantize["bits"] if quantized else None,
        group_size=quantize["group_size"] if quantized else None,
        symmetric=quantize["symmetric"] if quantized else None,
        metric=metric if isinstance(metric, str) else None,
        scores=report.get("scores") or {},
        mean=report.get("mean_score"),
        bytes=report["bytes"],
        report=report,
    )


def run_of_row(row: dict[str, Any]) -> Run:
    """A run from a row of a results file of `benchmarks.compare`."""
    metric = row.get("metric", "accuracy")
    fields = {name: row[name] for name in ("merge", "method", "bits", "group_size", "symmetric", "mean", "bytes")}
    return Run(name=row.get("suite", ""), metric=metric, scores=row[metric], **fields)


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], Scores | None]:
    """Runs from output directories, reports, or results files (whose row of experts is taken as such).

    Raises:
        FileNotFoundError, ValueError: a path holds no report; it is named.
    """
    runs, experts = list[Run](), None
    for path in paths:
        file = path / REPORT if path.is_dir() else path
        if not file.exists():
            raise MissingError(f"{file}: missing; give output directories of epmq run, or their {REPORT}")
        content = _read(file)
        try:
            if isinstance(content, list):
                told = [row for row in content if row["merge"] == "experts"]
                experts = Scores(run_of_row(told[0]).scores, told[0]["mean"]) if told else experts
                runs += [run_of_row(row) for row in content if row["merge"] not in ("base", "experts")]
            else:
                runs.append(run_of(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a report of epmq ({type(error).__name__}: {error})") from None
    return runs, experts


def _read(file: Path) -> Any:
    with error_context(file, "not valid JSON"):
        return json.loads(file.read_text(encoding="utf-8"))


def read_experts(path: Path) -> Scores:
    """The experts' scores from what `epmq eval --experts --json` prints.

    Raises:
        ValueError: there are none in it; the file is named.
    """
    content = _read(path)
    found = content.get("experts", content) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("scores"), dict):
        raise InputError(f"{path}: no experts' scores; make it with epmq eval DIR RECIPE --experts --json")
    return Scores(found["scores"], found.get("mean_score"))


def write_page(
    path: Path,
    runs: Sequence[Run],
    *,
    experts: Scores | None = None,
    published: dict[tuple[str, str, int | None], float] | None = None,
    title: str | None = None,
) -> None:
    """Write the page of some runs.

    Args:
        path: the file.
        runs: at least one. GPTQ of the same merge on the same grid, and the same merge in full precision, are looked
            for among them.
        experts: what the experts score, each on its own task.
        published: (merge, method, bits) → published mean, in the same unit as the runs' means.
        title: heading; by default it says what was merged.
    """
    path.write_text(page(runs, experts=experts, published=published or {}, title=title), encoding="utf-8")


def page(
    runs: Sequence[Run],
    *,
    experts: Scores | None = None,
    published: dict[tuple[str, str, int | None], float] | None = None,
    title: str | None = None,
) -> str:
    """The page as HTML; arguments as in `write_page`."""
    names = labels(runs)
    heading = title or _heading(runs)
    parts = [
        f"<h1>{escape(heading)}</h1>",
        _lead(runs, experts),
        "<h2>Summary</h2>",
        _summary(runs, names, experts, published or {}),
        "<h2>Tasks</h2>" if any(run.scores for run in runs) else "",
        _tasks(runs, names, experts),
        "<h2>Pictures</h2>",
        f'<div class="figures">{"".join(_figures(runs, names, experts))}</div>',
        _notes(runs, names),
        _settings(runs, names),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(heading)}</title><style>{_STYLE}{charts.STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name a run: method and bits, and whatever else is needed to tell them apart."""
    merges, names = {run.merge for run in runs}, []
    grids = {run.grid for run in runs if run.bits is not None}
    bits = {grid[0] for grid in grids}
    for run in runs:
        parts = [TITLES.get(run.method, run.method)]
        if run.bits is not None and len(grids) > 1:
            parts.append(f"{run.bits} bits" if len(bits) == len(grids) else run.weights)
        names.append(", ".join([run.merge, *parts] if len(merges) > 1 else parts))
    return [name if names.count(name) == 1 else f"{name} [{run.name}]" for name, run in zip(names, runs)]


def reference(run: Run, runs: Sequence[Run], method: str) -> Run | None:
    """GPTQ of the same merge on the same grid, or with "none" the same merge in full precision."""
    for other in runs:
        same = other.merge == run.merge and other.method == method and other.metric == run.metric
        if same and (method == "none" or other.grid == run.grid) and other.scores.keys() == run.scores.keys():
            return other
    return None


def gap(run: Run, runs: Sequence[Run], experts: Scores | None) -> float | None:
    """Share of the way from GPTQ to the experts; None where one of them is missing."""
    gptq = reference(run, runs, "gptq")
    if gptq is None or gptq.mean is None or run.mean is None or experts is None or experts.mean is None:
        return None
    return gap_recovered(run.mean, gptq.mean, experts.mean)


def _heading(runs: Sequence[Run]) -> str:
    tasks = max((len(run.scores) or len(run.report.get("recipe", {}).get("experts", ())) for run in runs), default=0)
    return f"{tasks} experts in one model" + (f": {len(runs)} runs" if len(runs) > 1 else "")


def _lead(runs: Sequence[Run], experts: Scores | None) -> str:
    if len(runs) > 1:
        base = {run.report["recipe"]["base"] for run in runs if run.report}
        return f'<p class="dim">{escape(", ".join(sorted(base)))}</p>'
    [run] = runs
    size = "" if run.bytes is None else f", {run.bytes / 1e6:.1f} MB"
    name = run.report["recipe"]["base"] if run.report else run.name
    text = f"{name}: merged by {run.merge}, {TITLES.get(run.method, run.method)}, {run.weights}{size}"
    return f'<p class="dim">{escape(text)}</p>'


def _change(run: Run, other: Run | float | None) -> str:
    """How far a run's mean is from another one, with a sign: in points, or of a perplexity in percent."""
    other = other.mean if isinstance(other, Run) else other
    if run.mean is None or other is None:
        return "–"
    if run.metric == "log_perplexity":
        return _signed(100 * math.expm1(run.mean - other), 1, " %", "+")
    return _signed(100 * (run.mean - other), 1, "", "+")


def _signed(value: float, digits: int, unit: str, plus: str = "") -> str:
    """A number with a minus that is one, and none before a zero."""
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}{unit}".replace("-", "−")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], own: int | None = None) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for i, row in enumerate(rows):
        kind = ' class="own"' if i == own else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _summary(
    runs: Sequence[Run],
    names: Sequence[str],
    experts: Scores | None,
    published: dict[tuple[str, str, int | None], float],
) -> str:
    """One line a run: the mean, how it compares, and what it costs."""
    told = [published.get((run.merge, run.method, run.bits)) for run in runs]
    gaps = [gap(run, runs, experts) for run in runs]
    gptq = [reference(run, runs, "gptq") if run.bits is not None else None for run in runs]
    full = [reference(run, runs, "none") for run in runs]
    columns: list[tuple[str, list[str]]] = [("model", list(names))]
    if any(run.mean is not None for run in runs):
        metric = next((run.metric for run in runs if run.metric), None)
        columns.append((f"mean {METRICS.get(metric or '', 'score')}", [run.show(run.mean) for run in runs]))
    if any(value is not None for value in gaps):
        columns.append(("gap recovered", ["–" if value is None else _signed(100 * value, 0, " %") for value in gaps]))
    for title, others in (("to GPTQ", gptq), ("to the merged model", full)):
        if any(other is not None and other is not run for run, other in zip(runs, others)):
            cells = ["–" if other in (None, run) else _change(run, other) for run, other in zip(runs, others)]
            columns.append((title, cells))
    if any(value is not None for value in told):
        columns.append(("published", [run.show(value) for run, value in zip(runs, told)]))
        columns.append(("to published", [_change(run, value) for run, value in zip(runs, told)]))
    columns.append(("weights", [run.weights for run in runs]))
    columns.append(("MB", ["–" if run.bytes is None else f"{run.bytes / 1e6:.1f}" for run in runs]))
    if any(run.report for run in runs):
        spent = [sum(run.report["seconds"].values()) if run.report else None for run in runs]
        columns.append(("time", ["–" if value is None else f"{value:.0f} s" for value in spent]))
    rows = [list(row) for row in zip(*(cells for _, cells in columns))]
    own = next((i for i, run in enumerate(runs) if run.method == "expert_guided"), None) if len(runs) > 1 else None
    text = _table([title for title, _ in columns], rows, own)
    if experts is not None and experts.mean is not None:
        text += f'<p class="small dim">The experts, each on its own task: {escape(runs[0].show(experts.mean))}.</p>'
    if all(run.mean is None for run in runs) and any(run.scores for run in runs):
        text += '<p class="small dim">Tasks are scored in different ways, so there is no mean.</p>'
    if not any(run.scores for run in runs):
        text += '<p class="small dim">Nothing was scored: the recipe names no evaluation data.</p>'
    return text


def _tasks(runs: Sequence[Run], names: Sequence[str], experts: Scores | None) -> str:
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores))
    if not tasks:
        return ""
    rows = [[name, *(run.show(run.scores.get(task)) for task in tasks)] for name, run in zip(names, runs) if run.scores]
    if experts is not None:
        rows.append(["experts", *(runs[0].show(experts.scores.get(task)) for task in tasks)])
    return _table(["model", *tasks], rows)


def _figure(svg: str, title: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption></figure>"


def _shower(runs: Sequence[Run]) -> Callable[[float], str]:
    """How values on an axis are shown: percent, or a perplexity."""
    return (lambda value: f"{value:.4g}") if _perplexity(runs) else (lambda value: f"{value:.1f}".removesuffix(".0"))


def _perplexity(runs: Sequence[Run]) -> bool:
    return any(run.metric == "log_perplexity" for run in runs)


def _value(run: Run, score: float) -> float:
    """A score as it goes on an axis."""
    return math.exp(score) if run.metric == "log_perplexity" else 100 * score


def _figures(runs: Sequence[Run], names: Sequence[str], experts: Scores | None) -> Iterable[str]:
    scored = [(name, run) for name, run in zip(names, runs) if run.scores]
    missing = []
    metric = METRICS.get(next((run.metric for _, run in scored if run.metric), None) or "", "score")
    if scored:
        yield _tasks_figure(scored, experts, metric, _shower(runs))
    gaps: charts.Series = {}
    for run in runs:
        value = gap(run, runs, experts)
        if value is not None and run.bits is not None and run.method not in ("gptq", "rtn"):
            merge = f"{run.merge}, " if len({other.merge for other in runs}) > 1 else ""
            gaps.setdefault(f"{merge}{TITLES.get(run.method, run.method)}", []).append((run.bits, 100 * value))
    if gaps:
        svg = charts.lines(gaps, "bits", "gap recovered, %", lambda value: f"{value:.0f}", FORMS)
        yield _figure(svg, "Gap recovered by bits", "0 is GPTQ on the same grid, 100 the experts.")
    else:
        missing.append("gap recovered by bits (GPTQ's run beside it, and the experts' scores)")
    if len({run.bytes for _, run in scored if run.bytes and run.mean is not None}) > 1:
        yield _sizes_figure([run for _, run in scored], metric, _shower(runs))
    else:
        missing.append("size against score (runs of several sizes)")
    for name, run in zip(names, runs):
        if any(layer["loss"] is not None for layer in run.report.get("layers", ())):
            yield _layers_figure(name if len(runs) > 1 else "", run)
    if not any(run.report.get("layers") for run in runs):
        missing.append("loss by depth (a report with layers)")
    if missing:
        text = "; ".join(missing)
        yield f'<p class="small dim">Not shown for want of data: {escape(text)}. <code>epmq report DIR DIR …</code></p>'


def _tasks_figure(
    scored: Sequence[tuple[str, Run]], experts: Scores | None, metric: str, show: Callable[[float], str]
) -> str:
    few, told = list(scored), ""
    if len(few) > 6:  # more marks in a row are not read any more
        most, merge = max(run.bits or 0 for _, run in few), few[0][1].merge
        chosen = [run for _, run in few if run.bits in (None, most) and run.merge == merge]
        few = list(zip(labels(chosen), chosen))
        told = f" Merged by {merge}; {most} bits, and full precision."
    tasks = list(dict.fromkeys(task for _, run in few for task in run.scores))
    rows = {task: {name: _value(run, run.scores[task]) for name, run in few if task in run.scores} for task in tasks}
    for task in tasks:
        if experts is not None and task in experts.scores:
            rows[task]["experts"] = _value(few[0][1], experts.scores[task])
    unit = metric if metric == "perplexity" else f"{metric}, %"
    svg = charts.dots(rows, unit, show, _forms(few), log=metric == "perplexity")
    return _figure(svg, f"{metric.capitalize()} by task and method", f"One row a task, one mark a model.{told}")


def _forms(named: Sequence[tuple[str, Run]]) -> charts.Forms | None:
    """Each run in its method's colour, where there is one of each method."""
    forms = {name: FORMS.get(TITLES.get(run.method, run.method), 7) for name, run in named}
    forms |= {"experts": FORMS["experts"]}
    return forms if len(set(forms.values())) == len(forms) else None


def _sizes_figure(runs: Sequence[Run], metric: str, show: Callable[[float], str]) -> str:
    series: dict[str, list[tuple[float, float, str]]] = {}
    for run in runs:
        if run.bytes and run.mean is not None:
            label = f"{run.bits} bits" if run.bits else "full"
            point = run.bytes / 1e6, _value(run, run.mean), label
            series.setdefault(TITLES.get(run.method, run.method), []).append(point)
    unit = metric if metric == "perplexity" else f"mean {metric}, %"
    svg = charts.scatter(series, "MB", unit, show, FORMS, log=metric == "perplexity")
    return _figure(svg, "Size against score", "All weights of a checkpoint.")


def by_block(layers: Iterable[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Losses summed over the layers of each block: (block, merging deviation, quantization deviation)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        parts = layer["name"].split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 2)
        found.setdefault(".".join(parts[: last + 1]), []).append((layer["merge_loss"] or 0.0, layer["loss"] or 0.0))
    return [
        (block, sum(merged for merged, _ in parts), sum(lost for _, lost in parts)) for block, parts in found.items()
    ]


def _layers_figure(name: str, run: Run) -> str:
    blocks = by_block(run.report["layers"])
    series: charts.Series = {"quantization": [(i, lost) for i, (_, _, lost) in enumerate(blocks, 1) if lost > 0]}
    merging: list[charts.Point] = [(i, merged) for i, (_, merged, _) in enumerate(blocks, 1) if merged > 0]
    if merging:
        series = {"merging": merging, **series}
    svg = charts.lines(series, "block", "deviation from the target", lambda value: f"{value:.2g}", log=True)
    caption = (
        "What the merged weight is off the target (merging), and what the codes are off it (quantization), both under "
        "the layer's Hessian, summed over the block's layers; a logarithmic axis."
        if merging
        else "What the codes are off the merged weight, under the layer's Hessian, summed over the block's layers."
    )
    return _figure(svg, f"Loss by depth{': ' if name else ''}{name}", caption)


def _notes(runs: Sequence[Run], names: Sequence[str]) -> str:
    items = [
        f"<li>{escape(f'{name}: ' if len(runs) > 1 else '')}{escape(note)}</li>"
        for name, run in zip(names, runs)
        for note in run.report.get("notes", ())
    ]
    return f"<h2>Notes</h2><ul>{''.join(items)}</ul>" if items else ""


def _settings(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Recipe, versions, hardware and cost of every run that has a report."""
    parts = []
    for name, run in zip(names, runs):
        if not run.report:
            continue
        about = {
            key: run.report[key] for key in ("date", "versions", "hardware", "seconds", "peak_memory_mb", "recipe")
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    return f"<h2>Settings and versions</h2>{''.join(parts)}" if parts else ""
