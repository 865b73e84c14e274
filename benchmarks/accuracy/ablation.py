"""`python -m benchmarks.accuracy.ablation [SUITE …]`: what each step of the method adds, over three calibration draws.

Task Arithmetic at 4 bits, one scale a row, on test data, with half of the calibration examples that
`compare` takes, so that three draws of every step are affordable. Every run goes to
`benchmarks/results/ablation.json` when it is done; runs that are there already are kept unless `--fresh` is given. The
steps of a draw run one after the other, so their processor times (opening, merging and quantizing) compare.
`python -m benchmarks.tables` makes the table.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.accuracy.compare import SAMPLES, TEST_SAMPLES, is_language, measure
from benchmarks.records import provenance, read_rows
from benchmarks.suites.__main__ import SUITES, build
from epmq.files import write_json
from epmq.quantize_settings import BY_HEADS
from epmq.reporting.scores import show_score

PATH = RESULTS / "ablation.json"
SEEDS = (0, 1, 2)
_PLAIN = {"anchor_strength": 0.03, "anchor_scale": 1.0, "expert_features": 0.0, "expert_stream": True}
_STREAM = {"method": "expert_guided", **_PLAIN, "adapt_heads": False}
# By whether the suite has heads. From E-PMQ on each step has what the one before it has; the last is the default. Heads
# on plain GPTQ show what they do alone.
STEPS: dict[bool, dict[str, dict[str, Any]]] = {
    True: {
        "GPTQ": {"method": "gptq"},
        "GPTQ + heads": {"method": "gptq", "adapt_heads": True},
        "E-PMQ": {"method": "e_pmq"},
        "+ stream": _STREAM,
        "+ heads, far anchor": {"method": "expert_guided", **BY_HEADS[True], "adapt_heads": True},
    },
    False: {
        "GPTQ": {"method": "gptq"},
        "E-PMQ": {"method": "e_pmq"},
        "+ stream": _STREAM,
        "+ features": {"method": "expert_guided", **BY_HEADS[False], "adapt_heads": False},
    },
}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart; a step whose settings have changed is another run."""
    return row["suite"], row["step"], row["seed"], row["samples"], tuple(sorted(row["settings"].items()))


def main() -> None:
    """Read the command line and measure the runs that are missing, a seed at a time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.ablation", description=__doc__)
    parser.add_argument("suites", nargs="*", default=SUITES, help="all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="of the calibration draw")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    arguments = parser.parse_args()
    if arguments.fresh:
        write_json(PATH, [row for row in read_rows(PATH) if row["suite"] not in arguments.suites])
    console = Console(stderr=True)
    suites = [importlib.import_module(f"benchmarks.suites.{name}") for name in arguments.suites]
    for seed in arguments.seeds:
        for suite in suites:
            root, samples = build(suite), SAMPLES[suite.NAME] // 2
            for name, step in STEPS[not is_language(suite)].items():
                row = {"suite": suite.NAME, "step": name, "seed": seed, "samples": samples, "settings": step}
                if identity(row) in map(identity, read_rows(PATH)):
                    continue
                report = measure(
                    suite,
                    root,
                    list(suite.TASKS),
                    "task_arithmetic",
                    {"bits": 4, **step},
                    samples=samples,
                    test_samples=TEST_SAMPLES,
                    seed=seed,
                )
                row |= {"metric": report["metric"], "mean": report["mean_score"], "tasks": report["scores"]}
                row |= {"seconds": report["seconds"], "cpu_seconds": report["cpu_seconds"]}
                row |= provenance()
                others = [r for r in read_rows(PATH) if identity(r)[:3] != identity(row)[:3]]
                write_json(PATH, [*others, row])
                console.print(f"{suite.NAME} {name} {seed}: {show_score(report['metric'], report['mean_score'])}")


if __name__ == "__main__":
    main()
