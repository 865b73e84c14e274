"""`epmq reproduce`: run a published table row by row, and set our figures beside the published ones."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from epmq.data.processors import tokenizer_of
from epmq.errors import InputError, OutputExistsError
from epmq.files import cache_dir, differences, read_json, write_whole
from epmq.merging.compatibility import open_experts
from epmq.models.blocks import use_fast_matmul
from epmq.models.multitask import load
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.processor import output_processor
from epmq.pipeline.run import run
from epmq.recipe import Recipe
from epmq.reporting.page import render_page
from epmq.reporting.report import PAGE, REPORT
from epmq.reporting.runs import Run, Scores
from epmq.reproduce.lm_eval import lm_eval, load_lm_eval
from epmq.reproduce.results import markdown, row_result, with_published
from epmq.reproduce.tables import Row, RunOptions, Table, base_source, load_table, row_recipe
from epmq.reproduce.zeroshot import text_heads
from epmq.runtime import hardware, now, select_device, versions

RESULTS, MARKDOWN = "table.json", "table.md"
REPORTS, CHECKPOINTS = "reports", "checkpoints"


def reproduce(
    name: str | Path | Table,
    output: str | Path,
    options: RunOptions | None = None,
    *,
    resume: bool = False,
    keep: bool = False,
    progress: bool = True,
    say: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:
    """Run a published table.

    Args:
        name: of a table that comes with epmq, or a YAML file.
        output: a folder: `table.json`, `table.md` and `report.html` after every row, each run's report in `reports/`.
        options: which rows, on how much data, and where; all of them on all data where there are none.
        resume: go on in an output that is there: finished rows stay, a row that was stopped goes on from its blocks.
        keep: leave every row's checkpoint in `checkpoints/`.
        progress: show progress bars.
        say: told what is done next.

    Returns:
        what `table.json` holds: `rows` and all that they rest on. Scores are 0 to 100.

    Raises:
        FileExistsError: there are results already, and `resume` is not given.
        FileNotFoundError, ValueError: the field, file or tensor at fault is named.
    """
    table = name if isinstance(name, Table) else load_table(name)
    output, options = Path(output), options or RunOptions()
    rows = options.rows(table)
    settings = {"table": table.model_dump(mode="json"), "limit": options.limit, "versions": versions()}
    results = _finished_rows(output, settings, resume)
    if table.by_lm_eval:
        load_lm_eval()  # or say that it is missing, before anything is fetched
    base = base_source(table, options.hub)
    heads = head_files(table, base)
    for row in rows:
        if row.name in results:
            say(f"{row.name}: finished before")
            continue
        say(row.name)
        checkpoint = output / CHECKPOINTS / row.name
        recipe = row_recipe(table, row, base, heads, options, checkpoint)
        report = _run_row(table, row, recipe, options, progress)
        results[row.name] = row_result(table, row, report)
        if "layers" in report:
            _write_json(output / REPORTS / f"{row.name}.json", report)
        _write_results(table, output, settings, results)
        if not keep:
            shutil.rmtree(checkpoint, ignore_errors=True)
            with suppress(OSError):
                checkpoint.parent.rmdir()  # if it is empty
    return _write_results(table, output, settings, results)


def head_files(table: Table, base: str) -> dict[str, Path]:
    """Head files of the tasks whose heads come from the base's text tower."""
    texts = ((name, task.classes, task.templates) for name, task in table.tasks.items())
    tasks = {name: (classes, templates) for name, classes, templates in texts if classes and templates}
    return text_heads(base, tasks, cache_dir() / "heads") if tasks else {}


def _run_row(table: Table, row: Row, recipe: Recipe, options: RunOptions, progress: bool) -> dict[str, Any]:
    """Make the model of a row, if the row has one of its own, and score it; returns a report with scores."""
    report: dict[str, Any] = {"seconds": {}, "date": now()}
    if row.merge is not None:
        written = Path(str(recipe.output)) / REPORT  # is there if the run was stopped just after it
        report = (
            read_json(written) if written.exists() else run(recipe, evaluate=not table.by_lm_eval, progress=progress)
        )
        if not table.by_lm_eval:
            return report
    start = time.perf_counter()
    if table.by_lm_eval:
        scores = _score_by_lm_eval(table, row, recipe, options)
    else:
        scores = evaluate_experts(recipe, base=row.method == "base", progress=progress)
    seconds = {**report["seconds"], "evaluate": round(time.perf_counter() - start, 2)}
    return {**report, **scores, "seconds": seconds}


def _score_by_lm_eval(table: Table, row: Row, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Scores of a row; a task's score is the mean over its tasks in lm-eval."""
    scores: dict[str, float] = {}
    for model, tokenizer, names in _models(table, row, recipe):
        tasks = {name: table.tasks[name].lm_eval or {} for name in names}
        lm_tasks = {name: lm_task for parts in tasks.values() for name, lm_task in parts.items()}
        shares = lm_eval(model, tokenizer, lm_tasks, hub=options.hub, limit=options.limit, batch_size=recipe.batch_size)
        scores |= {task: sum(shares[name] for name in parts) / len(parts) for task, parts in tasks.items()}
    return {"metric": "lm-eval", "scores": scores, "mean_score": sum(scores.values()) / len(scores)}


def _models(table: Table, row: Row, recipe: Recipe) -> Iterator[tuple[nn.Module, Any, list[str]]]:
    """Each model of a row, its tokenizer and the tasks that it is scored on: an expert's own, or all."""
    device = select_device(recipe.device)
    if row.merge is not None:
        model = load(str(recipe.output), device)
        use_fast_matmul(model.backbone)  # as base and experts are
        yield model.backbone, tokenizer_of(model.processor), list(table.tasks)
        return
    experts = open_experts(recipe.base, recipe.experts, recipe.tokenizer, recipe.config)
    tokenizer = tokenizer_of(output_processor(experts).processor)
    if row.method == "base":
        yield experts.whole_model(experts.base, device), tokenizer, list(table.tasks)
        return
    for task in table.tasks:
        yield experts.whole_model(experts.experts[task], device), tokenizer, [task]


def _finished_rows(output: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, dict[str, Any]]:
    """The rows that an earlier run has finished.

    Raises:
        FileExistsError, ValueError: there are some, but they are not to be gone on from, or were made otherwise.
    """
    file = output / RESULTS
    if not file.exists():
        return {}
    if not resume:
        raise OutputExistsError(f"{file} exists already: go on with --resume, or give another folder")
    content = read_json(file)
    before = {name: content.get(name) for name in settings}
    if changes := "; ".join(differences(before, json.loads(json.dumps(settings)))):
        raise InputError(f"{file} was made otherwise ({changes}): give another folder")
    return {row["row"]: row for row in content["rows"] if "mean" in row}


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
    _write_json(output / RESULTS, content)
    write_whole(output / MARKDOWN, markdown(content).encode())
    _write_page(table, output, content["rows"])
    return content


def _write_page(table: Table, output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The finished rows as a page, if there are any that have a report."""
    runs, experts = [], None
    for row in rows:
        file = output / REPORTS / f"{row['row']}.json"
        if row["method"] == "experts" and "mean" in row:
            experts = Scores({task: score / 100 for task, score in row["scores"].items()}, row["mean"] / 100)
        elif file.exists():
            run_of_row = Run.from_report(read_json(file))
            runs.append(replace(run_of_row, name=row["row"], merge=row["merge"], method=row["method"]))
    if runs:
        published = {(figure.merge or "", figure.method, figure.bits): figure.mean / 100 for figure in table.published}
        text = render_page(runs, experts=experts, published=published, title=table.title)
        write_whole(output / PAGE, text.encode())


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False).encode())
