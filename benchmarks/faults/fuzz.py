"""`python -m benchmarks.faults.fuzz`: whether damaged files end in one clear error.

How the files are damaged and opened, and what counts, is in `tests.kit.fuzz`. Of the refusals, `unnamed` counts the
errors that name neither the damaged file nor its folder. Adds its figures to `benchmarks/results/faults.json`;
`--seed N --only K` opens input K again and shows what became of it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.faults.__main__ import add_results
from tests.kit.fuzz import Result, failed, fuzz, outcomes


def main() -> None:
    """Read the command line, open damaged inputs, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--only", type=int, help="open this one input, and show what became of it")
    parser.add_argument("--log", type=Path, help="a file for what became of every input, one a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    console, log = Console(stderr=True), list[Result]()

    def show(message: Any) -> None:
        console.print(message, markup=False)

    if arguments.only is not None:
        for result in outcomes(range(arguments.only, arguments.only + 1), arguments.seed, show=True):
            show(asdict(result))
        return
    counts = {**fuzz(arguments.inputs, arguments.seed, show, log), "seed": arguments.seed}
    if arguments.log is not None:
        arguments.log.write_text("".join(json.dumps(asdict(result)) + "\n" for result in log))
    add_results({**counts, "failed": [asdict(result) for result in log if failed(result)]})


if __name__ == "__main__":
    main()
