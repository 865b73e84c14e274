"""`python -m benchmarks.speed.growth`: how time and memory of a run grow, beside what a dry run predicts.

Llama-shaped models with random weights (float32) are calibrated on random tokens. One thing grows at a time: width,
depth, the number of experts (the tokens are shared out among them) and the number of calibration tokens. Each run is a
process of its own with one thread, and makes its prediction right before; times are of merging and quantizing, without
opening, which the dry run has done by then. Writes `benchmarks/results/growth.json`, a row after each run; rows that
are there are kept unless `--fresh` is given. With matplotlib (`pip install epmq[plots]`) it draws
`docs/growth-time.svg` and `docs/growth-memory.svg` from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import RESULTS, ROOT
from benchmarks.records import provenance, read_rows
from benchmarks.speed.shapes import LLAMA, WATCHED, Clock, Shape, tasks, write_models
from epmq import dry_run
from epmq.files import cache_dir, write_json
from epmq.pipeline import run as pipeline

TOKENS = 128  # of a text
START = {"width": 256, "blocks": 4, "experts": 4, "tokens": 4096}
GROWN = {"width": (256, 512, 1024), "blocks": (4, 8, 16), "experts": (2, 4, 8), "tokens": (2048, 4096, 8192, 16384)}
# Exponents that the operations and the tensors in memory have: products grow with the square of the width and the
# solver with its cube; one block of the model and one of an expert are in memory at any time.
EXPECTED = {
    "seconds": {"width": "2 to 3", "blocks": "1", "experts": "0", "tokens": "1"},
    "memory": {"width": "1 to 2", "blocks": "0", "experts": "0", "tokens": "1"},
}


def points() -> list[dict[str, int]]:
    """All jobs, each once."""
    jobs = [{**START, name: value} for name, values in GROWN.items() for value in values]
    return [job for i, job in enumerate(jobs) if job not in jobs[:i]]


def shape(job: dict[str, int]) -> Shape:
    """The models and the calibration of a job."""
    width = job["width"]
    sizes = {"vocab_size": 8192, "hidden_size": width, "intermediate_size": width * 11 // 4}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    samples = job["tokens"] // job["experts"] // TOKENS
    config = {**LLAMA, **sizes, **heads, "max_position_embeddings": 2048}
    return Shape("LlamaForCausalLM", config, job["blocks"], job["experts"], samples, tokens=TOKENS)


def measure(job: dict[str, int], root: Path) -> dict[str, Any]:
    """Predict and run one job in this process; the row for the results file."""
    made = shape(job)
    recipe = {
        "base": str(root / "base"),
        "experts": [{"name": task, "model": str(root / task)} for task in tasks(made)],
        "merge": {"method": "task_arithmetic"},
        "output": str(root / "out"),
        "device": "cpu",
    }
    calibration = {task: made.batches(seed) for seed, task in enumerate(tasks(made))}
    plan = dry_run(recipe, calibration=calibration, progress=False)
    predicted = {phase: round(seconds, 2) for phase, seconds in plan.seconds.items() if phase != "open"}
    clock = Clock()
    with ExitStack() as stack:
        for owner, function, phase in WATCHED:
            stack.enter_context(clock.watch(owner, function, phase))
        report = pipeline.run(recipe, calibration=calibration, evaluate=False, progress=False)
    return {
        **job,
        "seconds": report["seconds"]["merge and quantize"],
        "phases": clock.read(),
        "cpu_seconds": report["cpu_seconds"]["merge and quantize"],
        "peak_memory_mb": report["peak_memory_mb"],
        "output_bytes": report["bytes"],
        "predicted": {
            "phases": predicted,
            "cpu_seconds": round(sum(predicted.values()), 2),
            "peak_memory_mb": round(plan.peak_memory_mb, 1),
            "output_bytes": plan.output_bytes,
        },
        "resident_mb": round(plan.resident_mb, 1),
        **provenance(),
    }


def measure_apart(job: dict[str, int]) -> dict[str, Any]:
    """Write the models of a job and measure it in a process of its own."""
    root = cache_dir() / "shapes" / "growth"
    shutil.rmtree(root, ignore_errors=True)  # what was cut off, perhaps of another job
    try:
        write_models(shape(job), root)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [
                sys.executable,
                "-m",
                "benchmarks.speed.growth",
                "--worker",
                json.dumps(job),
                str(root),
                file.name,
            ]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            return json.loads(Path(file.name).read_text())
    finally:
        shutil.rmtree(root, ignore_errors=True)


def grown(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows in which one thing grows, in order."""
    fixed = {other: value for other, value in START.items() if other != name}
    return sorted((row for row in rows if fixed.items() <= row.items()), key=lambda row: row[name])


def spent(row: dict[str, Any], cost: str) -> float:
    """Seconds of the processor, or the memory in MB that a run takes beyond what is resident once all is open."""
    return row["cpu_seconds"] if cost == "seconds" else row["peak_memory_mb"] - row["resident_mb"]


def exponent(rows: list[dict[str, Any]], name: str, cost: str) -> float:
    """Slope of a straight line through the logarithms."""
    x, y = [math.log(row[name]) for row in rows], [math.log(spent(row, cost)) for row in rows]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw time and memory against all that grows, measured and predicted.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("the plots need matplotlib: pip install 'epmq[plots]'")
    titles = {"cpu_seconds": ("time", "seconds of the processor"), "peak_memory_mb": ("memory", "peak MB")}
    for field, (cost, label) in titles.items():
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(GROWN), sharey=True), GROWN):
            line = grown(rows, name)
            values = [row[name] for row in line]
            axes.plot(values, [row[field] for row in line], "o-", label="measured")
            axes.plot(values, [row["predicted"][field] for row in line], "x--", label="predicted")
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xlabel(name)
            if cost == "time":
                axes.set_yscale("log", base=2)
            else:
                axes.set_ylim(bottom=0)
        figure.axes[0].set_ylabel(label)
        figure.axes[0].legend()
        figure.savefig(folder / f"growth-{cost}.svg", metadata={"Date": None})


def main() -> None:
    """Read the command line, measure what is missing and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.growth", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure anew what has a row already")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        job, root, file = arguments.worker
        write_json(Path(file), measure(json.loads(job), Path(root)))
        return
    path, console = RESULTS / "growth.json", Console(stderr=True)
    rows = [] if arguments.fresh else read_rows(path)
    for job in points():
        if not any(job.items() <= row.items() for row in rows):
            rows.append(measure_apart(job))
            write_json(path, rows)
            console.print(f"{job}: {rows[-1]['cpu_seconds']} s, {rows[-1]['peak_memory_mb']} MB")
    draw(rows, ROOT / "docs")


if __name__ == "__main__":
    main()
