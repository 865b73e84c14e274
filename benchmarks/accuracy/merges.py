"""`python -m benchmarks.accuracy.merges [SUITE …]`: which merge to start from, with and without the experts' guidance.

Each merge in full precision, and at 4 bits with one scale a row: GPTQ with heads that follow where there are heads
(plain GPTQ where there are none), and expert_guided with its default settings; on test data. Beside them the experts,
and GPTQ on Task Arithmetic without heads, from which the share of the gap is counted that a row recovers. What draws
no calibration data is measured once a draw of test data as well. `featcal` stands for a peer that calibrates a merge
(`benchmarks.accuracy.featcal`) and gets the same calibration data: in full precision, and then quantized by GPTQ with
the experts' heads as they are, and with heads that follow.

Every run goes to `benchmarks/results/merges.json` when it is done; runs that are there already are kept unless
`--fresh` is given. With `--validation` nothing is kept: scores on validation data, for choices, also of some tasks
(`--tasks`), or of expert_guided with other settings than its defaults (`--set anchor_scale=1.4`). `python -m
benchmarks.tables` makes the table.
"""

from __future__ import annotations

import importlib
import itertools
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.accuracy.choose import VALIDATION
from benchmarks.accuracy.compare import MERGES, TEST_SAMPLES, is_language, measure
from benchmarks.accuracy.draws import CALIBRATION, draws_parser, forget_rows, keep_row
from benchmarks.accuracy.featcal import write_calibrated
from benchmarks.records import provenance, read_rows
from benchmarks.suites.__main__ import build
from benchmarks.suites.pool import pool_recipe
from epmq.files import parse_yaml
from epmq.pipeline.evaluation import evaluate_experts
from epmq.reporting.scores import show_score

PATH = RESULTS / "merges.json"
FULL, FOLLOWING, GUIDED, PLAIN = "full precision", "GPTQ + heads", "expert-guided", "GPTQ"
METHODS: dict[str, dict[str, Any]] = {
    FULL: {"method": "none"},
    FOLLOWING: {"method": "gptq", "bits": 4, "adapt_heads": True},
    GUIDED: {"method": "expert_guided", "bits": 4},
    PLAIN: {"method": "gptq", "bits": 4},
}
# From what the share of the gap is counted: GPTQ on this merge.
BASELINE = ("task_arithmetic", PLAIN)
# FeatCal's rows → the merge that it calibrates.
FEATCAL = {f"featcal on {start}": start for start in ("task_arithmetic", "wudi")}
# Suites that it is for: of encoders, whose experts are whole models, as an adapter would be applied to what it gives.
CALIBRATED = ("vision8", "text8")
# The merge by which a base stays as it is.
BASE_ALONE = {"method": "task_arithmetic", "scaling": 0.0}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart."""
    return row["suite"], row["merge"], row["method"], row["seed"]


def rows_of(suite: ModuleType, merges: list[str]) -> list[tuple[str, str]]:
    """Merge and method of each row, the experts first; `featcal` only where it can be measured."""
    methods = (FULL, PLAIN, GUIDED) if is_language(suite) else (FULL, FOLLOWING, GUIDED)
    rows = [("experts", FULL), BASELINE, *itertools.product(filter(MERGES.__contains__, merges), methods)]
    if "featcal" in merges and suite.NAME in CALIBRATED:
        rows += itertools.product(FEATCAL, (FULL, PLAIN, FOLLOWING))
    return list(dict.fromkeys(rows))


def run_row(
    suite: ModuleType,
    merge: str,
    method: str,
    fields: dict[str, Any],
    tasks: list[str] | None = None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure one row, of all tasks unless some are named, and with `more` settings of the quantizer."""
    root, tasks, quantize = build(suite), tasks or list(suite.TASKS), {**METHODS[method], **(more or {})}
    row: dict[str, Any] = {"suite": suite.NAME, "merge": merge, "method": method, "seed": fields["seed"]}
    row |= {"bits": METHODS[method].get("bits"), "samples": fields["samples"]}
    if merge == "experts":
        data = getattr(suite, "DATA", None)
        report = evaluate_experts(pool_recipe(root, tasks, max_length=suite.MAX_LENGTH, data=data, **fields))
        row |= {"seconds": None, "peak_memory_mb": None, "bytes": None}
    elif merge in FEATCAL:
        folder, cost = calibrated(suite, tuple(tasks), FEATCAL[merge], fields["samples"], fields["seed"])
        report = measure(suite, root, tasks, BASE_ALONE, quantize, base=folder.name, **fields)
        seconds = cost["seconds"] + (0 if method == FULL else seconds_of(report))
        peak = max(cost["peak_memory_mb"], report["peak_memory_mb"])
        row |= {"seconds": round(seconds, 1), "peak_memory_mb": peak, "bytes": report["bytes"]}
    else:
        report = measure(suite, root, tasks, merge, quantize, **fields)
        row |= {"seconds": round(seconds_of(report), 1), "peak_memory_mb": report["peak_memory_mb"]}
        row |= {"bytes": report["bytes"]}
    return row | {"metric": report["metric"], "mean": report["mean_score"], "tasks": report["scores"], **provenance()}


def seconds_of(report: dict[str, Any]) -> float:
    """Seconds of opening, merging and quantizing."""
    return sum(report["seconds"][phase] for phase in ("open", "merge and quantize"))


@lru_cache(maxsize=1)
def calibrated(
    suite: ModuleType, tasks: tuple[str, ...], start: str, samples: int, seed: int
) -> tuple[TemporaryDirectory[str], dict[str, float]]:
    """FeatCal's checkpoint on a merge, and what it cost, once for all rows in a line that start from it.

    That checkpoint is the base of their recipes, with the experts as they are and nothing merged: so each task has the
    head of its expert, and heads that follow ask the expert itself.
    """
    root = build(suite)
    fields: dict[str, Any] = {"merge": MERGES[start], "samples": samples, "seed": seed}
    recipe = pool_recipe(root, tasks, max_length=suite.MAX_LENGTH, quantize={"method": "none"}, **fields)
    folder = TemporaryDirectory(dir=root)
    return folder, write_calibrated(recipe, Path(folder.name))


def main() -> None:
    """Read the command line and measure the rows that are missing, a draw at a time."""
    parser = draws_parser("python -m benchmarks.accuracy.merges", __doc__)
    merges = [*MERGES, "featcal"]
    parser.add_argument("--merges", nargs="*", default=merges, choices=merges, help="all by default")
    parser.add_argument("--tasks", help="comma-separated, with --validation; all by default")
    parser.add_argument("--set", nargs="*", metavar="NAME=VALUE", help="of expert_guided alone, with --validation")
    arguments = parser.parse_args()
    if (arguments.tasks or arguments.set) and not arguments.validation:
        parser.error("--tasks and --set go with --validation: what is kept is of all tasks, at default settings")
    tasks = arguments.tasks.split(",") if arguments.tasks else None
    more = {name: parse_yaml(value) for name, _, value in (one.partition("=") for one in arguments.set or ())}
    if arguments.fresh:
        forget_rows(PATH, arguments.suites)
    console, split = Console(stderr=True), "validation" if arguments.validation else "test"
    for seed, name in itertools.product(arguments.seeds, arguments.suites):
        suite = importlib.import_module(f"benchmarks.suites.{name}")
        count = VALIDATION if arguments.validation else TEST_SAMPLES
        fields = {"seed": seed, "split": split, "test_samples": count, "samples": CALIBRATION[name]}
        done = set() if arguments.validation else {identity(row) for row in read_rows(PATH)}
        for merge, method in rows_of(suite, arguments.merges):
            if (name, merge, method, seed) in done or (more and method != GUIDED):
                continue
            row = run_row(suite, merge, method, fields, tasks, more)
            if not arguments.validation:
                keep_row(PATH, row, identity)
            console.print(f"{name} {merge}, {method} {seed}: {show_score(row['metric'], row['mean'])}")


if __name__ == "__main__":
    main()
