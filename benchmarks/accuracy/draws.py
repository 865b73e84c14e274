"""What benchmarks have in common that measure rows over several draws of calibration and test examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accuracy.compare import SAMPLES
from benchmarks.records import read_rows
from benchmarks.suites.__main__ import SUITES
from epmq.files import write_json

SEEDS = (0, 1, 2)
# Calibration examples a task: half of those of the large tables, so that three draws of every row are affordable.
CALIBRATION = {suite: samples // 2 for suite, samples in SAMPLES.items()}

# What tells rows apart.
Identity = Callable[[dict[str, Any]], tuple[Any, ...]]


def draws_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Which suites and draws are measured, and on which data."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("suites", nargs="*", default=SUITES, help="all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="of the draws")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--validation", action="store_true", help="on validation data; nothing is kept")
    return parser


def forget_rows(path: Path, suites: list[str]) -> None:
    """Take the rows of some suites out of a results file."""
    write_json(path, [row for row in read_rows(path) if row["suite"] not in suites])


def keep_row(path: Path, row: dict[str, Any], identity: Identity) -> None:
    """Put a row into a results file, in the place of the one that it repeats; others may have come in the meantime."""
    write_json(path, [*(kept for kept in read_rows(path) if identity(kept) != identity(row)), row])
