"""`python -m benchmarks.faults`: what becomes of runs that are killed, whose disk fails, or that are done again.

A tiny model of six blocks (nothing here depends on what the weights say) is merged and quantized once without
interruption. Then, again and again, a process that does the same is killed (signal 9) after a random time, and started
anew until it comes to its end; every file of its output but report.json and README.md, which tell of times, must then
be the same, byte for byte, and nothing else may have been left behind. Writes to `benchmarks/results/faults.json`:
kills, how many of them left finished blocks, runs that came to their end, and how many of these were identical; what
`tests.kit.write_faults` finds of every write that fails, and of full disks; what `benchmarks.faults.repeats` finds of
the same run with other threads, order of tasks and batch size; and of how many tiny architectures one expert, merged at
scaling 1.0, is that expert (`tests.kit.identity`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from benchmarks import RESULTS
from benchmarks.faults.related import related
from benchmarks.faults.repeats import halve_real_batches, repeat
from benchmarks.records import provenance
from benchmarks.suites.__main__ import SUITES
from benchmarks.suites.build import suite_dir
from epmq.calibration import offload
from epmq.files import write_json
from epmq.pipeline.journal import BLOCKS
from epmq.pipeline.run import run
from tests.kit import wrong_merges
from tests.kit.identity import identities
from tests.kit.runs import contents, examples, finish, recipe, write_models
from tests.kit.write_faults import fail_everywhere, fill_disks

PATH = RESULTS / "faults.json"
CAMPAIGNS = ("kills", "disks", "wrong", "repeats", "related", "batches", "identities")


def disk_faults(folder: Path) -> dict[str, int]:
    """Every write fails once, with calibration activations in memory and on the disk; and disks are full."""
    counts = Counter[str]()
    offload.SMALLEST = 1 << 10  # or nothing here would be large enough
    for store in ("memory", "disk"):
        finish(folder, f"whole-{store}", activations=store)
        whole = contents(folder / f"whole-{store}")
        needed = 3 * sum(map(len, whole.values()))

        def same(out: Path, whole: dict[str, bytes] = whole) -> bool:
            return contents(out) == whole

        def do(out: Path, store: str = store) -> None:
            finish(folder, str(out), activations=store)

        (folder / f"faults-{store}").mkdir()
        counts.update(fail_everywhere(do, folder / f"faults-{store}", same))
        with suppress(PermissionError):
            counts.update(fill_disks(do, folder / f"disk-{store}", needed, same))
    return counts


def repeats(folder: Path) -> dict[str, Any]:
    """The same run under other circumstances."""
    torch.set_num_threads(os.cpu_count() or 1)

    def do(recipe: dict[str, Any], batches: dict[str, list[dict[str, torch.Tensor]]]) -> None:
        run(recipe, progress=False, evaluate=False, calibration=batches)

    return repeat(do, folder, recipe(folder, "repeat"), examples())


def start(folder: Path, output: str) -> int:
    """Do the run in a process of its own, which begins with all modules imported; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        finish(folder, output)
        status = 0
    finally:
        os._exit(status)


def kill_until(kills: int, folder: Path, show: Console) -> dict[str, int]:
    """Kill runs at random times, and let each come to its end after a few kills, until there were enough kills."""
    names = ("kills", "kills_with_finished_blocks", "runs", "resumed_identical", "errors", "left_behind")
    counts = dict.fromkeys(names, 0)
    finish(folder, "first")  # imports
    began = time.perf_counter()
    finish(folder, "whole")
    seconds, whole = time.perf_counter() - began, contents(folder / "whole")
    before = set(os.listdir(folder))
    chance = random.Random(0)
    while counts["kills"] < kills:
        for _ in range(chance.randint(1, 4)):
            child = start(folder, "out")
            time.sleep(chance.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            counts["kills"] += killed
            counts["kills_with_finished_blocks"] += killed and any((folder / ".out.work" / BLOCKS).glob("*.json"))
            if not killed:
                break
        there = (folder / "out").exists()  # where it is, a run refuses, and sweeps up
        _, status = os.waitpid(start(folder, "out"), 0)
        counts["errors"] += (status == 0) == there
        counts["runs"] += 1
        counts["resumed_identical"] += (folder / "out").is_dir() and contents(folder / "out") == whole
        shutil.rmtree(folder / "out", ignore_errors=True)
        counts["left_behind"] += set(os.listdir(folder)) != before
        show.print(counts)
    return counts


def built() -> list[str]:
    """Suites whose experts are there."""
    return [name for name in SUITES if all((suite_dir(name) / part).is_dir() for part in ("base", "experts"))]


def add_results(figures: dict[str, Any]) -> None:
    """Put figures into the results file, beside those of other campaigns."""
    before = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    write_json(PATH, {**before, **figures, **provenance()})


def main() -> None:
    """Read the command line, kill, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many runs to kill")
    parser.add_argument("--only", choices=CAMPAIGNS, help="one of the campaigns alone")
    arguments = parser.parse_args()
    logging.getLogger("epmq").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # threads do not survive a fork
    figures: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        campaigns: dict[str, Callable[[], dict[str, Any]]] = {
            "kills": lambda: kill_until(arguments.kills, folder, Console(stderr=True)),
            "disks": lambda: disk_faults(folder),
            "wrong": lambda: wrong_merges.count(folder, folder, recipe),
            "repeats": lambda: {"repeats": repeats(folder)},
            "related": lambda: {"related": {name: related(name) for name in built()}},
            "batches": lambda: {"batches": {name: halve_real_batches(name, folder) for name in built()}},
            "identities": lambda: {"identities": identities(Console(stderr=True).print)},
        }
        for campaign in [arguments.only] if arguments.only else campaigns:
            figures |= campaigns[campaign]()
    add_results(figures)


if __name__ == "__main__":
    main()
