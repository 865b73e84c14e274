"""`python -m benchmarks.accuracy.limits`: what holds the default recipe back: calibration examples, or bits.

Task Arithmetic on test data: the default with more calibration examples a task, and, so that quantization costs as good
as nothing, at 8 bits a group of 32. Every run goes to `benchmarks/results/limits.json` when it is done; those that are
there already are kept unless `--fresh` is given. `python -m benchmarks.tables` makes the table.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.accuracy.compare import TEST_SAMPLES, default, measure
from benchmarks.records import provenance, read_rows
from benchmarks.suites.__main__ import build
from epmq.files import write_json
from epmq.reporting.scores import show_score

PATH = RESULTS / "limits.json"
# Suite, calibration examples a task (all there are where a task has fewer), bits, group size.
RUNS = (
    ("vision8", 256, 8, 32),
    ("vision8", 512, 4, -1),
    ("vision8", 1024, 4, -1),
    ("text8", 128, 4, -1),
    ("text8", 256, 8, 32),
    ("text8", 512, 4, -1),
    ("causal3", 64, 8, 32),
)


def main() -> None:
    """Read the command line and measure the runs that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.limits", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    if parser.parse_args().fresh:
        PATH.unlink(missing_ok=True)
    console = Console(stderr=True)
    for name, samples, bits, group_size in RUNS:
        row: dict[str, Any] = {"suite": name, "samples": samples, "bits": bits, "group_size": group_size}
        if any(row.items() <= old.items() for old in read_rows(PATH)):
            continue
        suite = importlib.import_module(f"benchmarks.suites.{name}")
        quantize = {"method": "expert_guided", "bits": bits, "group_size": group_size}
        report = measure(
            suite,
            build(suite),
            list(suite.TASKS),
            "task_arithmetic",
            quantize,
            samples=samples,
            test_samples=TEST_SAMPLES,
            seed=0,
        )
        row |= {
            "metric": report["metric"],
            "mean": report["mean_score"],
            "tasks": report["scores"],
            "cpu_seconds": report["cpu_seconds"],
        }
        row |= {"settings": default(suite), **provenance()}
        write_json(PATH, [*read_rows(PATH), row])
        console.print(f"{name}, {samples} examples, {bits} bits: {show_score(report['metric'], report['mean_score'])}")


if __name__ == "__main__":
    main()
