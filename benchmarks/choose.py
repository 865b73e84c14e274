"""`python -m benchmarks.choose SUITE`: choose the settings of expert_guided on the validation splits.

Task Arithmetic at 4 bits, one scale a row; every candidate's mean validation score goes to
`benchmarks/results/choice-<suite>.json`, after each; candidates that are there already are kept unless `--fresh` is
given. No test data is touched.
"""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from rich.console import Console

from benchmarks.compare import RESULTS, measure
from benchmarks.suites.__main__ import SUITES, build
from epmq.checkpoint import write_json
from epmq.evaluate import show_score
from epmq.report import hardware, now, versions

# Validation examples a task.
VALIDATION = 400
# How much of the experts' features, whether to aim at their stream, where the anchor lies and how strong it is: a weak
# one at the merged weight, or a strong one near the full sum of the task vectors.
CANDIDATES: list[dict[str, Any]] = [
    {"expert_features": features, "expert_stream": stream, "anchor_scale": scale, "anchor_strength": strength}
    for features, stream, scale, strength in (
        (0.0, True, 1.0, 0.03),
        (0.6, True, 1.0, 0.03),
        (0.0, True, 3.0, 3.0),
        (0.0, False, 1.0, 0.03),
        (0.6, False, 1.0, 0.03),
        (1.0, False, 1.0, 0.1),
        (0.6, False, 3.0, 0.3),
        (0.5, False, 3.0, 3.0),
    )
]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells candidates apart; rows from before `expert_stream` do not have it."""
    if row["method"] != "expert_guided":
        return (row["method"],)
    return tuple(row.get(name, False) for name in CANDIDATES[0])


def main() -> None:
    """Read the command line and measure the candidates that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.suites.{arguments.suite}")
    root, tasks, console = build(suite), list(suite.TASKS), Console(stderr=True)
    path = RESULTS / f"choice-{suite.NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not arguments.fresh else []
    for candidate in [{"method": "gptq"}, *({"method": "expert_guided", **candidate} for candidate in CANDIDATES)]:
        if key(candidate) in map(key, rows):
            continue
        quantize = {"bits": 4, **candidate}
        report = measure(suite, root, tasks, "task_arithmetic", quantize, split="validation", test_samples=VALIDATION)
        rows.append({**candidate, "validation": report["mean_score"], "tasks": report["scores"], "date": now()})
        console.print(f"{candidate} {show_score(report['metric'], report['mean_score'])}")
        where = {"versions": versions(), "hardware": hardware(), "date": now()}
        write_json(path, {"suite": suite.NAME, "metric": report["metric"], "rows": rows, **where})


if __name__ == "__main__":
    main()
