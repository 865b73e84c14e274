"""`epmq reproduce`: run a published table row by row, and set our figures beside the published ones."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from epmq.data.encoding import load_processor, tokenizer_of
from epmq.errors import InputError, OutputExistsError
from epmq.files import cache_dir, differences, write_whole
from epmq.merging.experts import Sources
from epmq.models.blocks import use_fast_matmul
from epmq.models.multitask import load
from epmq.pipeline.run import evaluate_experts, run
from epmq.recipe import Recipe
from epmq.reporting.page import render_page
from epmq.reporting.report import PAGE
from epmq.reporting.runs import Run, Scores
from epmq.reproduce.lm_eval import library, lm_eval
from epmq.reproduce.results import markdown, row_result, with_published
from epmq.reproduce.tables import Row, Table, base_of, load_table, recipe_of
from epmq.reproduce.zeroshot import text_heads
from epmq.runtime import hardware, now, select_device, versions

RESULTS, MARKDOWN = "table.json", "table.md"
REPORTS, CHECKPOINTS = "reports", "checkpoints"

Say = Callable[[str], Any]


def reproduce(
    name: str | Path | Table,
    output: str | Path,
    *,
    limit: int | None = None,
    resume: bool = False,
    hub: str | Path | None = None,
    keep: bool = False,
    merges: Sequence[str] = (),
    methods: Sequence[str] = (),
    bits: Sequence[int] = (),
    device: str = "auto",
    progress: bool = True,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Run a published table.

    Args:
        name: of a table that comes with epmq, or a YAML file.
        output: a folder: `table.json`, `table.md` and `report.html` after every row, each run's report in `reports/`.
        limit: at most so many examples a task, to calibrate on and to score.
        resume: go on in an output that is there: finished rows stay, a row that was stopped goes on from its blocks.
        hub: a folder with models as `owner/name` and data sets as `datasets/owner/name`; what is not there is fetched.
        keep: leave every row's checkpoint in `checkpoints/`.
        merges, methods, bits: run only these rows of the grid; all where there are none.
        device: as in a recipe.
        progress: show progress bars.
        say: told what is done next.

    Returns:
        what `table.json` holds: `rows` and all that they rest on. Scores are 0 to 100.

    Raises:
        FileExistsError: there are results already, and `resume` is not given.
        FileNotFoundError, ValueError: the field, file or tensor at fault is named.
    """
    table = name if isinstance(name, Table) else load_table(name)
    output, hub = Path(output), None if hub is None else Path(hub).expanduser()
    wanted = chosen(table, merges, methods, bits)
    settings = {"table": table.model_dump(mode="json"), "limit": limit, "versions": versions()}
    results = _earlier(output, settings, resume)
    if table.by_lm_eval:
        library()  # or say that it is missing, before anything is fetched
    base = base_of(table, hub)
    heads = head_files(table, base)
    for row in wanted:
        if row.name in results:
            say(f"{row.name}: finished before")
            continue
        say(row.name)
        place = output / CHECKPOINTS / row.name
        recipe = recipe_of(table, row, base, heads, hub=hub, limit=limit, device=device, output=place)
        report = _run_lm(table, row, recipe, hub, limit, progress) if table.by_lm_eval else _run(row, recipe, progress)
        results[row.name] = row_result(table, row, report)
        if "layers" in report:
            _write(output / REPORTS / f"{row.name}.json", report)
        _write_results(table, output, settings, results)
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):
                place.parent.rmdir()  # if it is empty
    return _write_results(table, output, settings, results)


def chosen(table: Table, merges: Sequence[str], methods: Sequence[str], bits: Sequence[int]) -> list[Row]:
    """The rows that are wanted: base and experts always, a merge in full precision where any of its rows is.

    Raises:
        ValueError: a name is none of the table's.
    """
    for field, given, known in (
        ("merge", merges, list(table.merges)),
        ("method", methods, list(table.methods)),
        ("bits", bits, table.bits),
    ):
        if unknown := [value for value in given if value not in known]:
            raise InputError(f"{field}: the table has no {unknown[0]}; it has {', '.join(map(str, known))}")

    def among(row: Row) -> bool:
        if row.merge is None:
            return True
        if merges and row.merge not in merges:
            return False
        return row.bits is None or ((not methods or row.method in methods) and (not bits or row.bits in bits))

    return [row for row in table.rows() if among(row)]


def head_files(table: Table, base: str) -> dict[str, Path]:
    """Head files of the tasks whose heads come from the base's text tower."""
    told = {
        name: (task.classes, task.templates)
        for name, task in table.tasks.items()
        if task.classes is not None and task.templates is not None
    }
    return text_heads(base, told, cache_dir() / "heads") if told else {}


def _run(row: Row, recipe: Recipe, progress: bool) -> dict[str, Any]:
    """Do one row; returns a report with scores."""
    if row.bits is not None or row.method == "none":
        return made(recipe) or run(recipe, progress=progress)
    start = time.perf_counter()
    report = evaluate_experts(recipe, base=row.method == "base", progress=progress)
    return {**report, "seconds": {"evaluate": round(time.perf_counter() - start, 2)}, "date": now()}


def _run_lm(
    table: Table, row: Row, recipe: Recipe, hub: Path | None, limit: int | None, progress: bool
) -> dict[str, Any]:
    """Do one row that lm-eval scores; a task's score is the mean over its tasks in lm-eval."""
    report: dict[str, Any] = {"seconds": {}, "date": now()}
    if row.merge is not None:
        report = made(recipe) or run(recipe, evaluate=False, progress=progress)
    start, scores = time.perf_counter(), dict[str, float]()
    for model, tokenizer, tasks in _models(table, row, recipe):
        wanted = {name: one for task in tasks for name, one in (table.tasks[task].lm_eval or {}).items()}
        found = lm_eval(model, tokenizer, wanted, hub=hub, limit=limit, batch_size=recipe.batch_size)
        for task in tasks:
            parts = [found[name] for name in table.tasks[task].lm_eval or {}]
            scores[task] = sum(parts) / len(parts)
    seconds = {**report["seconds"], "evaluate": round(time.perf_counter() - start, 2)}
    mean = sum(scores.values()) / len(scores)
    return {**report, "metric": "lm-eval", "scores": scores, "mean_score": mean, "seconds": seconds}


def _models(table: Table, row: Row, recipe: Recipe) -> Iterator[tuple[nn.Module, Any, list[str]]]:
    """Each model of a row, its tokenizer and the tasks that it is scored on: an expert's own, or all."""
    if row.merge is not None:
        found = load(str(recipe.output), select_device(recipe.device))
        use_fast_matmul(found.backbone)  # as base and experts are
        yield found.backbone, tokenizer_of(found.processor), list(table.tasks)
        return
    sources = Sources(recipe)
    tokenizer = tokenizer_of(load_processor(sources.base.path))
    if row.method == "base":
        yield sources.whole_model(None, select_device(recipe.device)), tokenizer, list(table.tasks)
        return
    for task in table.tasks:
        yield sources.whole_model(task, select_device(recipe.device)), tokenizer, [task]


def made(recipe: Recipe) -> dict[str, Any] | None:
    """The report of a checkpoint that is there already, from a run that was stopped just after it."""
    file = Path(str(recipe.output)) / "report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _earlier(output: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, dict[str, Any]]:
    """The rows that an earlier run has finished.

    Raises:
        FileExistsError, ValueError: there are some, but they are not to be gone on from, or were made otherwise.
    """
    file = output / RESULTS
    if not file.exists():
        return {}
    if not resume:
        raise OutputExistsError(f"{file} exists already: go on with --resume, or give another folder")
    before = json.loads(file.read_text(encoding="utf-8"))
    old = {"table": before.get("table"), "limit": before.get("limit"), "versions": before.get("versions")}
    if changes := "; ".join(differences(old, json.loads(json.dumps(settings)))):
        raise InputError(f"{file} was made otherwise ({changes}): give another folder")
    return {row["row"]: row for row in before["rows"] if "mean" in row}


def _write_results(
    table: Table, output: Path, settings: Mapping[str, Any], results: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    content = {
        "title": table.title,
        "tasks": list(table.tasks),
        "rows": with_published(table, list(results.values())),
        "date": now(),
        "hardware": hardware(),
        **settings,
    }
    _write(output / RESULTS, content)
    write_whole(output / MARKDOWN, markdown(content).encode())
    _write_page(table, output, content["rows"])
    return content


def _write_page(table: Table, output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The finished rows as a page, if there are any that have a report."""
    runs, experts = [], None
    for entry in rows:
        file = output / REPORTS / f"{entry['row']}.json"
        if entry["method"] == "experts" and "mean" in entry:
            scores = {task: score / 100 for task, score in entry["scores"].items()}
            experts = Scores(scores, entry["mean"] / 100)
        elif file.exists():
            report = json.loads(file.read_text(encoding="utf-8"))
            names = {"name": entry["row"], "merge": entry["merge"], "method": entry["method"]}
            runs.append(replace(Run.from_report(report), **names))
    if runs:
        published = {(figure.merge or "", figure.method, figure.bits): figure.mean / 100 for figure in table.published}
        text = render_page(runs, experts=experts, published=published, title=table.title)
        write_whole(output / PAGE, text.encode())


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False).encode())
