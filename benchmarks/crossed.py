"""`python -m benchmarks.crossed`: the default as it would be if it had been chosen on other tasks only.

The defaults of expert_guided were chosen on validation examples of the suites' own tasks (`benchmarks.choose`). Here
every suite gets the candidate that the same rule takes from the validation files of other suites alone, at 4 bits with
one scale a row, merged by Task Arithmetic, on test data. Where that is the default, the suite has its row already;
another one is measured. Goes to `benchmarks/results/crossed.json`; what is there already is kept unless
`--fresh` is given.
"""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from rich.console import Console

from benchmarks.choose import best
from benchmarks.compare import RESULTS, SAMPLES, TEST_SAMPLES, default, is_language, measure, read_rows
from benchmarks.suites.__main__ import build
from epmq.files import write_json
from epmq.reporting.scores import show_score
from epmq.runtime import hardware, now, versions

PATH = RESULTS / "crossed.json"
# Suite → where its settings are chosen: suites of the same kind that share no task with it.
CHOSEN_ON = {"vision8": "text8", "text8": "vision8", "text8lora": "vision8", "causal3": "seq2seq", "seq2seq": "causal3"}
GRID = {"bits": 4, "group_size": -1, "symmetric": True}


def chosen(name: str) -> dict[str, Any]:
    """The settings that the rule takes for a suite from another one's validation file."""
    choice = json.loads((RESULTS / f"choice-{CHOSEN_ON[name]}.json").read_text())
    return best([choice], not is_language(importlib.import_module(f"benchmarks.suites.{name}")))


def main() -> None:
    """Read the command line and fill in what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossed", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("suites", nargs="*", default=tuple(CHOSEN_ON), help="all by default")
    arguments = parser.parse_args()
    if arguments.fresh:
        PATH.unlink(missing_ok=True)
    for name in arguments.suites:
        other = CHOSEN_ON[name]
        suite = importlib.import_module(f"benchmarks.suites.{name}")
        row: dict[str, Any] = {"suite": name, "chosen_on": other, "settings": chosen(name), "samples": SAMPLES[name]}
        if any(row.items() <= old.items() for old in read_rows(PATH)) or row["settings"] == default(suite):
            continue
        quantize = {"method": "expert_guided", **GRID, **row["settings"]}
        fields = {"test_samples": TEST_SAMPLES, "seed": 0}
        found = measure(suite, build(suite), list(suite.TASKS), "task_arithmetic", quantize, **fields)
        row |= {"metric": found["metric"], "mean": found["mean_score"], "tasks": found["scores"]}
        row |= {"versions": versions(), "hardware": hardware(), "date": now()}
        write_json(PATH, [*(old for old in read_rows(PATH) if old["suite"] != name), row])
        Console(stderr=True).print(f"{name}: {show_score(found['metric'], found['mean_score'])}")


if __name__ == "__main__":
    main()
