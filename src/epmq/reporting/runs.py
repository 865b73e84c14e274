"""Runs as a page compares them: read from reports and results files, named, and held against each other."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epmq.errors import InputError, MissingError, error_context
from epmq.merge_settings import Merge, settings_classes
from epmq.reporting.report import REPORT, grid_text, stored_by_depth
from epmq.reporting.scores import gap_recovered, score_title, show_score

METHOD_TITLES = {"none": "merged", "rtn": "RTN", "gptq": "GPTQ", "e_pmq": "E-PMQ", "expert_guided": "expert-guided"}
# … of GPTQ where heads follow the model, which they do only if they are told to.
WITH_HEADS = " with heads"
# … of a model that was trained towards the experts when its codes were chosen.
REFINED = " refined"


def method_title(quantize: Mapping[str, Any]) -> str:
    """The method of a recipe's settings of quantization in words."""
    method: str = quantize["method"]
    heads = WITH_HEADS if method == "gptq" and quantize.get("adapt_heads") else ""
    return METHOD_TITLES.get(method, method) + heads + (REFINED if is_refined(quantize) else "")


def is_refined(quantize: Mapping[str, Any]) -> bool:
    """Whether settings of quantization ask for training towards the experts."""
    return bool(quantize.get("refine", "off") != "off")


@dataclass(frozen=True)
class Run:
    """What a page shows of one run.

    Attributes:
        name: what it is called where its settings do not tell it apart.
        merge: method and settings of the merge.
        method: of quantization; "none" for a merge in full precision.
        bits, group_size, symmetric: the grid; None in full precision.
        metric: its name, or None if nothing was scored or tasks differ in it.
        metrics: by task, where tasks differ.
        scores, mean: by task, and over the tasks; None where there is no mean.
        bytes: of all weights.
        bits_per_weight: of the whole model, where that is known.
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
    metrics: dict[str, str] = field(default_factory=dict)
    bits_per_weight: float | None = None

    @classmethod
    def from_report(cls, report: dict[str, Any]) -> "Run":
        """A run from its report; a KeyError names a field that is missing."""
        quantize, merge, metric = report["recipe"]["quantize"], report["recipe"]["merge"], report.get("metric")
        defaults = settings_classes(Merge)[merge["method"]]().model_dump()
        changed = {name: merge.get(name) for name in defaults if merge.get(name) not in (None, defaults[name])}
        settings = [f"{name} {value}" for name, value in changed.items()]
        grid = {name: quantize[name] for name in ("bits", "group_size", "symmetric")}
        return cls(
            name=Path(report["output"] or "run").name,
            merge=merge["method"] + (f" ({', '.join(settings)})" if settings else ""),
            method=quantize["method"],
            **(dict.fromkeys(grid) if quantize["method"] == "none" else grid),
            metric=metric if isinstance(metric, str) else None,
            scores=report.get("scores") or {},
            mean=report.get("mean_score"),
            bytes=report["bytes"],
            report=report,
            metrics=metric if isinstance(metric, dict) else {},
            bits_per_weight=report.get("bits_per_weight"),
        )

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Run":
        """A run from a row of a results file of `benchmarks.compare`."""
        metric = row.get("metric", "accuracy")
        fields = {name: row[name] for name in ("merge", "method", "bits", "group_size", "symmetric", "mean", "bytes")}
        fields["bits_per_weight"] = row.get("bits_per_weight")
        return cls(name=row.get("suite", ""), metric=metric, scores=row[metric], **fields)

    @property
    def grid(self) -> tuple[int | None, int | None, bool | None]:
        return self.bits, self.group_size, self.symmetric

    @property
    def title(self) -> str:
        """The method in words."""
        return method_title(self.quantize)

    @property
    def quantize(self) -> dict[str, Any]:
        """The settings of quantization, as far as they are known."""
        return {"method": self.method, **self.report.get("recipe", {}).get("quantize", {})}

    @property
    def weights(self) -> str:
        """The grid of the layers in the blocks in words."""
        if self.bits is None:
            return "full precision"
        grids = {bits for row in stored_by_depth(self.report).values() for bits, _ in row.values()}
        if len(grids) > 1:
            return f"{min(grids)} to {max(grids)} bits, by layer"
        return grid_text({"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric})

    def metric_of(self, task: str | None) -> str:
        """The metric of a task, or that of the mean."""
        return self.metrics.get(task or "", self.metric or "accuracy")

    def show(self, score: float | None, task: str | None = None) -> str:
        """The score of a task, or of the mean, as text; a dash where there is none."""
        if score is None:
            return "–"
        if self.metrics and task is None:
            return f"{100 * score:.1f}"  # of several metrics, all of them shares
        return show_score(self.metric_of(task), score)


@dataclass(frozen=True)
class Scores:
    """Scores that runs are held against, such as the experts', each on its own task."""

    scores: dict[str, float]
    mean: float | None


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
            if not isinstance(content, list):
                runs.append(Run.from_report(content))
                continue
            if row := next((row for row in content if row["merge"] == "experts"), None):
                experts = Scores(Run.from_row(row).scores, row["mean"])
            runs += [Run.from_row(row) for row in content if row["merge"] not in ("base", "experts")]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a report of epmq ({type(error).__name__}: {error})") from None
    return runs, experts


def read_experts(path: Path) -> Scores:
    """The experts' scores from what `epmq eval --experts --json` prints; a ValueError names a file without any."""
    content = _read(path)
    experts = content.get("experts", content) if isinstance(content, dict) else None
    if not isinstance(experts, dict) or not isinstance(experts.get("scores"), dict):
        raise InputError(f"{path}: no experts' scores; make it with epmq eval DIR RECIPE --experts --json")
    return Scores(experts["scores"], experts.get("mean_score"))


def _read(file: Path) -> Any:
    with error_context(file, "not valid JSON"):
        return json.loads(file.read_text(encoding="utf-8"))


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name a run: method and bits, and whatever else is needed to tell them apart."""
    merges, names = {run.merge for run in runs}, []
    grids = {run.grid for run in runs if run.bits is not None}
    bits = {grid[0] for grid in grids}
    for run in runs:
        parts = [run.merge, run.title] if len(merges) > 1 else [run.title]
        if run.bits is not None and len(grids) > 1:
            parts.append(f"{run.bits} bits" if len(bits) == len(grids) else run.weights)
        names.append(", ".join(parts))
    return [name if names.count(name) == 1 else f"{name} [{run.name}]" for name, run in zip(names, runs)]


def common_score_title(runs: Sequence[Run]) -> str:
    """What the scores of runs are, by the first whose tasks have one metric."""
    return score_title(next((run.metric for run in runs if run.metric), None))


def reference(run: Run, runs: Sequence[Run], method: str) -> Run | None:
    """GPTQ of the same merge on the same grid, unrefined, or with "none" the same merge in full precision."""
    for other in runs:
        scored = (other.metric, other.metrics) == (run.metric, run.metrics)
        same = other.merge == run.merge and other.method == method and scored and not is_refined(other.quantize)
        if same and (method == "none" or other.grid == run.grid) and other.scores.keys() == run.scores.keys():
            return other
    return None


def gap(run: Run, runs: Sequence[Run], experts: Scores | None) -> float | None:
    """Share of the way from GPTQ to the experts; None where one of them is missing."""
    gptq = reference(run, runs, "gptq")
    if gptq is None or gptq.mean is None or run.mean is None or experts is None or experts.mean is None:
        return None
    return gap_recovered(run.mean, gptq.mean, experts.mean)
