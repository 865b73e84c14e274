"""`python -m benchmarks.faults.combinations`: whether any combination of models and data ends in a wrong result unseen.

How combinations are drawn and what counts is in `tests.kit.combinations`. Adds its figures to
`benchmarks/results/faults.json`; `--seed N --only K` tries combination K again and shows what became of it, and
`--start` goes on from a number, for a campaign in portions.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.faults.__main__ import add_results
from tests.kit.combinations import BAD, GOOD, Result, campaign, outcomes, quiet


def totals(log: list[Result], seed: int) -> dict[str, Any]:
    """Counts by outcome, and the combination of each failure."""
    counts = Counter(result.outcome for result in log)
    failed = [{**asdict(result), "trace": ""} for result in log if result.outcome in BAD]  # with --only it is shown
    return {
        "drawn": len(log),
        **{outcome: counts[outcome] for outcome in (*GOOD, *BAD)},
        "seed": seed,
        "failed": failed,
    }


def read_log(path: Path) -> list[Result]:
    """The results of earlier portions; of a number that is there twice, the later."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    return list({result.combination["number"]: result for result in results}.values())


def main() -> None:
    """Read the command line, try combinations, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.combinations", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", type=int, help="try this one combination, and show what became of it")
    parser.add_argument("--log", type=Path, help="a file for what became of each, one a line; earlier lines count")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    quiet()
    console, log = Console(stderr=True), list[Result]()

    def show(message: Any) -> None:
        console.print(message, markup=False)

    if arguments.only is not None:
        for result in outcomes(range(arguments.only, arguments.only + 1), arguments.seed):
            show(asdict(result))
            show(result.trace)
        return
    campaign(range(arguments.start, arguments.start + arguments.count), arguments.seed, show, log)
    if arguments.log is not None:
        with arguments.log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(result)) + "\n" for result in log)
        log = read_log(arguments.log)
    add_results({"combinations": totals(log, arguments.seed)})


if __name__ == "__main__":
    main()
