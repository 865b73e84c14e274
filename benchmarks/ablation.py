"""`python -m benchmarks.ablation [SUITE …]`: what each step of the method adds, over three calibration draws.

Task Arithmetic at 4 bits, one scale a row, on test data. Every run goes to `benchmarks/results/ablation.json` when it
is done; runs that are there already are kept unless `--fresh` is given. `python -m benchmarks.tables` makes the table.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from rich.console import Console

from benchmarks.compare import RESULTS, TEST_SAMPLES, is_language, measure, read_rows
from benchmarks.suites.__main__ import SUITES, build
from epmq.checkpoint import write_json
from epmq.evaluate import show_score
from epmq.report import hardware, now, versions
from epmq.spec import BY_HEADS

PATH = RESULTS / "ablation.json"
SEEDS = (0, 1, 2)
_OURS = {"method": "expert_guided", **BY_HEADS[True], "sensitivity": True, "adapt_heads": True}
_WEAK = {"anchor_strength": 0.03, "anchor_scale": 1.0}
# Each step has what the one before it has, but for heads on plain GPTQ, which shows what they do alone.
STEPS: dict[str, dict[str, Any]] = {
    "GPTQ": {"method": "gptq"},
    "GPTQ + heads": {"method": "gptq", "adapt_heads": True},
    "E-PMQ": {"method": "e_pmq"},
    "+ stream": {**_OURS, **_WEAK, "sensitivity": False, "adapt_heads": False},
    "+ sensitivity": {**_OURS, **_WEAK, "adapt_heads": False},
    "+ heads": _OURS,
}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart; a step whose settings have changed is another run."""
    return row["suite"], row["step"], row["seed"], tuple(sorted(row["settings"].items()))


def steps_of(suite: Any) -> dict[str, dict[str, Any]]:
    """The steps of a suite: language models have no heads."""
    return {name: step for name, step in STEPS.items() if "heads" not in name or not is_language(suite)}


def main() -> None:
    """Read the command line and measure the runs that are missing, a seed at a time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("suites", nargs="*", default=SUITES, help="all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="of the calibration draw")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    arguments = parser.parse_args()
    if arguments.fresh:
        PATH.unlink(missing_ok=True)
    console = Console(stderr=True)
    suites = [importlib.import_module(f"benchmarks.suites.{name}") for name in arguments.suites]
    for seed in arguments.seeds:
        for suite in suites:
            root = build(suite)
            for name, step in steps_of(suite).items():
                row = {"suite": suite.NAME, "step": name, "seed": seed, "settings": step}
                if identity(row) in map(identity, read_rows(PATH)):
                    continue
                found = measure(
                    suite,
                    root,
                    list(suite.TASKS),
                    "task_arithmetic",
                    {"bits": 4, **step},
                    test_samples=TEST_SAMPLES,
                    seed=seed,
                )
                row |= {"metric": found["metric"], "mean": found["mean_score"], "tasks": found["scores"]}
                row |= {"seconds": found["seconds"], "versions": versions(), "hardware": hardware(), "date": now()}
                others = [r for r in read_rows(PATH) if identity(r)[:3] != identity(row)[:3]]
                write_json(PATH, [*others, row])
                console.print(f"{suite.NAME} {name} {seed}: {show_score(found['metric'], found['mean_score'])}")


if __name__ == "__main__":
    main()
