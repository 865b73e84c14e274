"""The pictures of a page: which runs allow, and what is drawn in each."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from epmq.reporting import charts
from epmq.reporting.report import block_losses, block_of, layer_grid, refine_line, stored_by_depth
from epmq.reporting.runs import Run, Scores, common_score_title, gap, labels
from epmq.reporting.scores import CORRELATIONS, SHARES

# Each method's colour and mark in every chart (see `epmq.reporting.charts`).
STYLES = {"merged": 6, "RTN": 4, "GPTQ": 0, "E-PMQ": 3, "expert-guided": 1, "experts": 2}
TWO_LOSSES = (
    "What the merged weight is off the target (merging), and what the codes are off it (quantization), both under the "
    "layer's Hessian, summed over the block's layers; a logarithmic axis."
)
ONE_LOSS = "What the codes are off the merged weight, under the layer's Hessian, summed over the block's layers."
# More marks in a row than these are not read any more.
MOST_MARKS = 6

Named = Sequence[tuple[str, Run]]


class Figure(NamedTuple):
    """A drawing with what stands below it."""

    svg: str
    title: str
    caption: str


class ScoreAxis:
    """How scores go on an axis: in percent, or as perplexities on a logarithmic one."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.title = common_score_title(runs)
        self.log = self.title == "perplexity"
        metrics = {run.metric for run in runs}
        self._digits = ".4g" if metrics & {"log_perplexity", "mse"} else ".1f"
        self._unit = "" if "mse" in metrics else " × 100" if metrics & set(CORRELATIONS) else ", %"

    def unit(self, prefix: str = "") -> str:
        return self.title if self.log else f"{prefix}{self.title}{self._unit}"

    def show(self, value: float) -> str:
        return f"{value:{self._digits}}".removesuffix(".0")

    @staticmethod
    def value(run: Run, score: float, task: str | None = None) -> float:
        metric = run.metric_of(task)
        return math.exp(score) if metric == "log_perplexity" else score if metric == "mse" else 100 * score


def draw_figures(runs: Sequence[Run], names: Sequence[str], experts: Scores | None) -> tuple[list[Figure], list[str]]:
    """The pictures that there is data for, and what is missing for the others."""
    figures, missing = list[Figure](), list[str]()
    scored = [(name, run) for name, run in zip(names, runs) if run.scores]
    sized = [run for _, run in scored if run.bytes and run.mean is not None]
    axis = ScoreAxis([run for _, run in scored])
    mixed = {run.metric_of(task) for _, run in scored if run.metrics for task in run.scores}
    if mixed <= set(SHARES):
        figures += [_tasks(scored, experts, axis)] if scored else []
    else:
        missing.append("scores by task (metrics that fit one axis)")
    if gaps := _gaps(runs, experts):
        svg = charts.lines(gaps, "bits", "gap recovered, %", "{:.0f}".format, STYLES)
        figures.append(Figure(svg, "Gap recovered by bits", "0 is GPTQ on the same grid, 100 the experts."))
    else:
        missing.append("gap recovered by bits (GPTQ's run beside it, and the experts' scores)")
    if len({run.bytes for run in sized}) > 1:
        figures.append(_sizes(sized, axis))
    else:
        missing.append("size against score (runs of several sizes)")
    figures += [*_refined(runs, names), *_depths(runs, names), *_stored(runs, names)]
    if not any(run.report.get("layers") for run in runs):
        missing.append("loss by depth (a report with layers)")
    return figures, missing


def _tasks(scored: Named, experts: Scores | None, axis: ScoreAxis) -> Figure:
    """Scores by task: of all runs, or of those on the finest grid where there are too many."""
    caption = "One row a task, one mark a model."
    if len(scored) > MOST_MARKS:
        bits, merge = max(run.bits or 0 for _, run in scored), scored[0][1].merge
        chosen = [run for _, run in scored if run.bits in (None, bits) and run.merge == merge]
        scored = list(zip(labels(chosen), chosen))
        caption += f" Merged by {merge}; {bits} bits, and full precision."
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for name, run in scored:
        for task, score in run.scores.items():
            rows[task][name] = axis.value(run, score, task)
    for task, row in rows.items():
        if experts is not None and task in experts.scores:
            row["experts"] = axis.value(scored[0][1], experts.scores[task], task)
    # Each run in its method's style, where there is one of each method.
    styles = {name: STYLES.get(run.title, 7) for name, run in scored} | {"experts": STYLES["experts"]}
    distinct = len(set(styles.values())) == len(styles)
    svg = charts.dots(rows, axis.unit(), axis.show, styles if distinct else None, axis.log)
    return Figure(svg, f"{axis.title.capitalize()} by task and method", caption)


def _gaps(runs: Sequence[Run], experts: Scores | None) -> charts.Series:
    """Points (bits, percent of the gap) by merge and method."""
    series: charts.Series = defaultdict(list)
    several = len({run.merge for run in runs}) > 1
    for run in runs:
        share = gap(run, runs, experts)
        if share is not None and run.bits is not None and run.method not in ("gptq", "rtn"):
            name = f"{run.merge}, {run.title}" if several else run.title
            series[name].append((run.bits, 100 * share))
    return series


def _sizes(runs: Sequence[Run], axis: ScoreAxis) -> Figure:
    series: charts.LabelledSeries = defaultdict(list)
    for run in runs:
        assert run.bytes is not None and run.mean is not None
        label = f"{run.bits} bits" if run.bits else "full"
        series[run.title].append((run.bytes / 1e6, axis.value(run, run.mean), label))
    svg = charts.scatter(series, "MB", axis.unit("mean "), axis.show, STYLES, axis.log)
    return Figure(svg, "Size against score", "All weights of a checkpoint.")


def _refined(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Figure]:
    """Held-out losses by epoch, of all runs that were trained towards the experts."""
    found = {name: run.report["refine"] for name, run in zip(names, runs) if run.report.get("refine")}
    if not found:
        return
    series = {name: [(float(epoch), loss) for epoch, loss in enumerate(one["held_out"])] for name, one in found.items()}
    kept = [f"{name}: {refine_line(one)}" if len(runs) > 1 else refine_line(one) for name, one in found.items()]
    caption = f"The loss on examples that are not trained on; 0 is the unrefined model. Kept: {'; '.join(kept)}."
    svg = charts.lines(series, "epoch", "held-out loss", "{:.3g}".format)
    yield Figure(svg, "Refined towards the experts", caption)


def _depths(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Figure]:
    """Losses by depth, a figure a run that has some."""
    for name, run in zip(names, runs):
        layers = run.report.get("layers", ())
        found = block_losses(layers)
        if not found or all(layer["loss"] is None for layer in layers):
            continue
        blocks, *losses = zip(*found)
        points = [[(float(depth), loss) for depth, loss in enumerate(own, 1) if loss > 0] for own in losses]
        named = zip(("merging", "quantization"), points)
        series: charts.Series = {kind: own for kind, own in named if own}
        if not series:  # nothing is rounded, and nothing merged otherwise
            continue
        caption = TWO_LOSSES if "merging" in series else ONE_LOSS
        if late := [block for block in blocks if block_of(block) is None]:
            caption += f" After the blocks: {', '.join(late)}."
        svg = charts.lines(series, "block", "deviation from the target", "{:.2g}".format, log=True)
        yield Figure(svg, f"Loss by depth: {name}" if len(runs) > 1 else "Loss by depth", caption)


def _stored(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Figure]:
    """How each layer is stored, a figure a run whose layers differ in it."""
    for name, run in zip(names, runs):
        rows = stored_by_depth(run.report)
        kinds = [text for _, text in sorted({stored for row in rows.values() for stored in row.values()})]
        if len(kinds) < 2:
            continue
        texts = {layer: {depth: text for depth, (_, text) in row.items()} for layer, row in rows.items()}
        outside = [layer for layer in run.report["layers"] if block_of(layer["name"]) is None]
        listed = [f"{layer['name']} {layer_grid(layer, {})}" for layer in outside]
        caption = "How the weights of each layer are stored." + (
            f" Outside the blocks: {'; '.join(listed)}." if listed else ""
        )
        svg = charts.matrix(texts, "block", "how each layer is stored, by block", kinds)
        yield Figure(svg, f"Bits by layer: {name}" if len(runs) > 1 else "Bits by layer", caption)
