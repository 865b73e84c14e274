"""`python -m benchmarks.limits`: what holds the default recipe back on vision8: calibration images, or bits.

Task Arithmetic on test data: the default with more calibration images a task, and, so that quantization costs as good
as nothing, at 8 bits a group of 32. Every run goes to `benchmarks/results/limits.json` when it is done; those that are
there already are kept unless `--fresh` is given. `python -m benchmarks.tables` makes the table.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from rich.console import Console

from benchmarks import compare
from benchmarks.compare import RESULTS, TEST_SAMPLES, measure, read_rows
from benchmarks.suites.__main__ import build
from epmq.checkpoint import write_json
from epmq.evaluate import show_score
from epmq.report import hardware, now, versions

PATH = RESULTS / "limits.json"
SUITE = "vision8"
# Calibration images a task (all there are where a task has fewer), bits, group size.
RUNS = ((256, 8, 32), (512, 4, -1), (1024, 4, -1))


def main() -> None:
    """Read the command line and measure the runs that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    if parser.parse_args().fresh:
        PATH.unlink(missing_ok=True)
    suite = importlib.import_module(f"benchmarks.suites.{SUITE}")
    root, console = build(suite), Console(stderr=True)
    for samples, bits, group_size in RUNS:
        row: dict[str, Any] = {"suite": SUITE, "samples": samples, "bits": bits, "group_size": group_size}
        if any(row.items() <= old.items() for old in read_rows(PATH)):
            continue
        quantize = {"method": "expert_guided", "bits": bits, "group_size": group_size}
        found = measure(
            suite,
            root,
            list(suite.TASKS),
            "task_arithmetic",
            quantize,
            samples=samples,
            test_samples=TEST_SAMPLES,
            seed=0,
        )
        row |= {"mean": found["mean_score"], "tasks": found["scores"], "cpu_seconds": found["cpu_seconds"]}
        row |= {"settings": compare.default(suite), "versions": versions(), "hardware": hardware(), "date": now()}
        write_json(PATH, [*read_rows(PATH), row])
        console.print(f"{samples} images, {bits} bits: {show_score(found['metric'], found['mean_score'])}")


if __name__ == "__main__":
    main()
