"""`python -m benchmarks.accuracy.choose SUITE`: the defaults of expert_guided are chosen on the validation splits.

Task Arithmetic at 4 bits, one scale a row; every candidate's mean validation score goes to
`benchmarks/results/choice-<suite>.json`, a row a calibration draw, after each; rows that are there already are kept
unless `--fresh` is given. No test data is touched. One choice is made for all suites with heads, and one for all
without: the candidate that keeps the largest share of the best one's gain over GPTQ on the suite where it keeps least
(`best`), by the mean over the draws. Plain GPTQ, and where there are heads GPTQ with heads that follow, are measured
beside them.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.accuracy.compare import GUIDED, SAMPLES, is_language, measure
from benchmarks.records import provenance
from benchmarks.suites.__main__ import SUITES, build
from epmq.files import write_json
from epmq.reporting.scores import show_score
from epmq.runtime import now

# Validation examples a task.
VALIDATION = 400
# Calibration examples a task: those of the tables, but half as many texts, with which the choice was made.
CALIBRATION = {**SAMPLES, "text8": 128}
# Calibration draws, by whether there are heads: a language model's runs are long.
SEEDS = {True: (0, 1), False: (0,)}
# By whether the experts have heads that follow. With heads: where the anchor lies and how strong it is, from a weak one
# at the merged weight to a strong one near the full sum of the task vectors. Without, the anchor is the weak one: from
# the paper's form on, the share of the experts' own features, and whether writers aim at the stream.
CANDIDATES: dict[bool, list[dict[str, Any]]] = {
    True: [
        dict(zip(GUIDED, (strength, scale, 0.0, True, True)))
        for scale, strength in ((1.0, 0.03), (2.0, 1.0), (3.0, 1.0), (3.0, 3.0), (3.0, 10.0), (3.0, 30.0))
    ],
    False: [
        dict(zip(GUIDED, (0.03, 1.0, features, stream, True)))
        for features, stream in ((0.0, False), (0.6, False), (0.0, True), (0.6, True))
    ],
}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells candidates apart: the same for all draws."""
    return (row["method"], *(row.get(name) for name in GUIDED))


def best(choices: Iterable[dict[str, Any]], heads: bool) -> dict[str, Any]:
    """The candidate whose worst suite is best, by the share it keeps of the best candidate's gain over GPTQ.

    Args:
        choices: contents of the files `choice-<suite>.json`.
        heads: whether these suites have heads.

    Raises:
        ValueError: a suite lacks a candidate.
    """
    shares: dict[tuple[Any, ...], list[float]] = {}
    for choice in choices:
        sign = -1 if choice["metric"] == "log_perplexity" else 1
        draws: dict[tuple[Any, ...], list[float]] = {}
        for row in choice["rows"]:
            draws.setdefault(key(row), []).append(sign * row["validation"])
        means = {name: sum(scores) / len(scores) for name, scores in draws.items()}
        start = means.pop(key({"method": "gptq"}))
        keys = [key({"method": "expert_guided", **candidate}) for candidate in CANDIDATES[heads]]
        missing = [name for name in keys if name not in means]
        if missing:
            raise ValueError(
                f"{choice['suite']}: run python -m benchmarks.accuracy.choose {choice['suite']}; missing {missing}"
            )
        most = max(means[name] for name in keys) - start
        for name in keys:
            shares.setdefault(name, []).append((means[name] - start) / most)
    kept = [min(share) for share in shares.values()]
    return CANDIDATES[heads][kept.index(max(kept))]


def main() -> None:
    """Read the command line and measure the candidates that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.choose", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.suites.{arguments.suite}")
    root, tasks, console = build(suite), list(suite.TASKS), Console(stderr=True)
    path = RESULTS / f"choice-{suite.NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not arguments.fresh else []
    plain: list[dict[str, Any]] = [{"method": "gptq"}]
    heads = not is_language(suite)
    if heads:
        plain.append({"method": "gptq", "adapt_heads": True})
    candidates = [*plain, *({"method": "expert_guided", **candidate} for candidate in CANDIDATES[heads])]
    for seed, candidate in itertools.product(SEEDS[heads], candidates):
        if (key(candidate), seed) in [(key(row), row["seed"]) for row in rows]:
            continue
        fields: dict[str, Any] = {"split": "validation", "test_samples": VALIDATION, "seed": seed}
        fields["samples"] = CALIBRATION[suite.NAME]
        report = measure(suite, root, tasks, "task_arithmetic", {"bits": 4, **candidate}, **fields)
        scores = {"validation": report["mean_score"], "tasks": report["scores"]}
        rows.append({**candidate, "seed": seed, **scores, "date": now()})
        console.print(f"{candidate} {seed} {show_score(report['metric'], report['mean_score'])}")
        where = provenance()
        write_json(path, {"suite": suite.NAME, "metric": report["metric"], "rows": rows, **where})


if __name__ == "__main__":
    main()
