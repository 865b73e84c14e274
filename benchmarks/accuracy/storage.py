"""`python -m benchmarks.accuracy.storage [SUITE …]`: what tables at low bits cost, and what a budget of bits is worth.

Expert-guided on Task Arithmetic, on test data, over three draws. Two sets of rows:

* `tables`: 4 bits, one scale a row, with tables and output layer at 16, 8 (the default) and 4 bits;
* `budgets`: 3 and 2 bits in groups of 64 with zero points, and tables of 8 bits; and as large a file whose bits are
  chosen layer by layer and table by table (`quantize.size`).

Every run goes to `benchmarks/results/storage.json` when it is done; runs that are there already are kept unless
`--fresh` is given. With `--validation` nothing is kept: scores on validation data, for choices. `python -m
benchmarks.tables` makes the tables.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.accuracy.compare import TEST_SAMPLES, measure
from benchmarks.accuracy.draws import CALIBRATION, draws_parser, forget_rows, keep_row
from benchmarks.records import provenance, read_rows
from benchmarks.suites.__main__ import build
from epmq.reporting.scores import show_score

PATH = RESULTS / "storage.json"
GROUPS = {"group_size": 64, "symmetric": False}


SETS: dict[str, dict[str, dict[str, Any]]] = {
    "tables": {
        "16": {"bits": 4, "embeddings": 16, "output_layer": 16},
        "8": {"bits": 4},
        "4": {"bits": 4, "embeddings": 4, "output_layer": 4},
    },
    "budgets": {
        "3 bits": {"bits": 3, **GROUPS},
        "chosen, as large as 3 bits": {"bits": 4, **GROUPS},
        "2 bits": {"bits": 2, **GROUPS},
        "chosen, as large as 2 bits": {"bits": 4, **GROUPS},
    },
}
# A row whose file may be as large as another's → that one.
AS_LARGE = {"chosen, as large as 3 bits": "3 bits", "chosen, as large as 2 bits": "2 bits"}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart."""
    return row["suite"], row["row"], row["seed"]


def run_row(suite: ModuleType, name: str, seed: int, limit: int | None, split: str) -> dict[str, Any]:
    """Measure one row; `limit` is the size that its file may have, where bits are chosen."""
    settings = {**SETS["tables"], **SETS["budgets"]}[name] | ({} if limit is None else {"size": limit})
    fields: dict[str, Any] = {"test_samples": TEST_SAMPLES, "seed": seed, "split": split}
    fields["samples"] = CALIBRATION[suite.NAME]
    root, tasks = build(suite), list(suite.TASKS)
    report = measure(suite, root, tasks, "task_arithmetic", {"method": "expert_guided", **settings}, **fields)
    row = {"suite": suite.NAME, "row": name, "seed": seed, "samples": CALIBRATION[suite.NAME], "settings": settings}
    row |= {"metric": report["metric"], "mean": report["mean_score"], "tasks": report["scores"]}
    row |= {"bytes": report["bytes"], "bits_per_weight": report["bits_per_weight"]}
    row |= {"seconds": report["seconds"], "cpu_seconds": report["cpu_seconds"]}
    bits = [layer["bits"] for layer in report["layers"]]
    return row | {"layers": {str(width): bits.count(width) for width in sorted(set(bits))}} | provenance()


def main() -> None:
    """Read the command line and measure the rows that are missing, a draw at a time."""
    parser = draws_parser("python -m benchmarks.accuracy.storage", __doc__)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS), help="all by default")
    arguments = parser.parse_args()
    if arguments.fresh:
        forget_rows(PATH, arguments.suites)
    console, split = Console(stderr=True), "validation" if arguments.validation else "test"
    for seed in arguments.seeds:
        for suite in [importlib.import_module(f"benchmarks.suites.{name}") for name in arguments.suites]:
            done = {} if arguments.validation else {identity(row): row for row in read_rows(PATH)}
            for name in (name for chosen in arguments.sets for name in SETS[chosen]):
                if (suite.NAME, name, seed) in done:
                    continue
                other = done.get((suite.NAME, AS_LARGE.get(name), seed))
                row = run_row(suite, name, seed, other["bytes"] if other else None, split)
                done[identity(row)] = row
                if not arguments.validation:
                    keep_row(PATH, row, identity)
                size = f"{row['bytes'] / 1e6:.2f} MB, {row['bits_per_weight']:.2f} bits"
                console.print(f"{suite.NAME} {name} {seed}: {show_score(row['metric'], row['mean'])}, {size}")


if __name__ == "__main__":
    main()
