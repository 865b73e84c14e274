"""`python -m benchmarks.choose SUITE`: choose the settings of expert_guided on the validation splits.

Task Arithmetic at 4 bits, one scale a row; every candidate's mean validation accuracy goes to
`benchmarks/results/choice-<suite>.json`. No test data is touched.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from rich.console import Console

from benchmarks.compare import GUIDED, RESULTS, is_language, measure
from benchmarks.suites.__main__ import SUITES, build
from epmq.checkpoint import write_json
from epmq.evaluate import show_score
from epmq.report import hardware, now, versions

# Validation examples a task.
VALIDATION = 400
CANDIDATES: list[dict[str, float]] = [
    {"expert_features": features, "anchor_scale": scale, "anchor_strength": strength}
    for features, scale, strength in (
        (0.0, 1, 0.03),
        (0.3, 1, 0.03),
        (0.6, 1, 0.03),
        (1, 1, 0.1),
        (0.6, 3, 0.3),
        (0.5, 3, 3),
    )
]


# Of language models, which cost more: both ways to anchor that won elsewhere, and one between.
LANGUAGE_CANDIDATES = [CANDIDATES[i] for i in (2, 4, 5)]


def main() -> None:
    """Read the command line and measure all candidates."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    suite = importlib.import_module(f"benchmarks.suites.{parser.parse_args().suite}")
    root, tasks, console = build(suite), list(suite.TASKS), Console(stderr=True)
    candidates = LANGUAGE_CANDIDATES if is_language(suite) else CANDIDATES
    rows: list[dict[str, Any]] = []
    for method, candidate in [("gptq", {}), *(("expert_guided", candidate) for candidate in candidates)]:
        quantize = {"method": method, "bits": 4, **candidate}
        report = measure(suite, root, tasks, "task_arithmetic", quantize, split="validation", test_samples=VALIDATION)
        rows.append({"method": method, **candidate, "validation": report["mean_score"], "tasks": report["scores"]})
        console.print(f"{method:14} {candidate} {show_score(report['metric'], report['mean_score'])}")
        content = {"suite": suite.NAME, "rows": rows, "chosen": GUIDED[suite.NAME]}
        where = {"versions": versions(), "hardware": hardware(), "date": now()}
        write_json(RESULTS / f"choice-{suite.NAME}.json", {**content, **where})


if __name__ == "__main__":
    main()
