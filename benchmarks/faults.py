"""`python -m benchmarks.faults`: what becomes of runs that are killed, whose disk fails, or that are done again.

A tiny model of six blocks (nothing here depends on what the weights say) is merged and quantized once without
interruption. Then, again and again, a process that does the same is killed (signal 9) after a random time, and started
anew until it comes to its end; every file of its output but report.json and README.md, which tell of times, must then
be the same, byte for byte, and nothing else may have been left behind. Writes to `benchmarks/results/faults.json`:
kills, how many of them left finished blocks, runs that came to their end, and how many of these were identical; what
`benchmarks.write_faults` finds of every write that fails, and of full disks; and what `benchmarks.repeats` finds of the
same run with other threads, order of tasks and batch size.
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
from transformers import BertConfig, BertModel

from benchmarks import wrong_merges
from benchmarks.compare import RESULTS
from benchmarks.repeats import halve_real_batches, repeat
from benchmarks.suites.__main__ import SUITES
from benchmarks.suites.build import suite_dir
from benchmarks.write_faults import fail_everywhere, fill_disks
from epmq.calibration import offload as spill
from epmq.files import write_json
from epmq.pipeline.journal import BLOCKS
from epmq.pipeline.run import run
from epmq.reporting.report import TIMED
from epmq.runtime import hardware, now, versions

PATH = RESULTS / "faults.json"
BLOCKS_OF_MODEL = 6
TASKS = ("one", "two")
CAMPAIGNS = ("kills", "disks", "wrong", "repeats", "related", "batches")


def write_models(folder: Path) -> None:
    """A base and two experts with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=BLOCKS_OF_MODEL, num_attention_heads=4, intermediate_size=256
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder / "base")
    for task in TASKS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        model.save_pretrained(folder / task)


def recipe(folder: Path, output: str) -> dict[str, Any]:
    """The default recipe on these models."""
    experts = [{"name": task, "model": str(folder / task)} for task in TASKS]
    return {"base": str(folder / "base"), "experts": experts, "output": str(folder / output)}


def examples() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Calibration batches of every task."""
    generator = torch.Generator().manual_seed(1)
    return {
        task: [{"input_ids": torch.randint(5, 64, (16, 32), generator=generator)} for _ in range(4)] for task in TASKS
    }


def finish(folder: Path, output: str, **fields: Any) -> None:
    run({**recipe(folder, output), **fields}, progress=False, evaluate=False, calibration=examples())


def disk_faults(folder: Path) -> dict[str, int]:
    """Every write fails once, with calibration activations in memory and on the disk; and disks are full."""
    found = Counter[str]()
    spill.SMALLEST = 1 << 10  # or nothing here would be large enough
    for place in ("memory", "disk"):
        finish(folder, f"whole-{place}", activations=place)
        wanted = contents(folder / f"whole-{place}")
        needed = 3 * sum(map(len, wanted.values()))

        def same(out: Path, wanted: dict[str, bytes] = wanted) -> bool:
            return contents(out) == wanted

        def do(out: Path, place: str = place) -> None:
            finish(folder, str(out), activations=place)

        (folder / f"faults-{place}").mkdir()
        found.update(fail_everywhere(do, folder / f"faults-{place}", same))
        with suppress(PermissionError):
            found.update(fill_disks(do, folder / f"disk-{place}", needed, same))
    return found


def repeats(folder: Path) -> dict[str, Any]:
    """The same run under other circumstances."""
    torch.set_num_threads(os.cpu_count() or 1)

    def do(recipe: dict[str, Any], batches: dict[str, list[dict[str, torch.Tensor]]]) -> None:
        run(recipe, progress=False, evaluate=False, calibration=batches)

    return repeat(do, folder, recipe(folder, "repeat"), examples())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, without the two that tell of times."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: content for name, content in files.items() if name not in TIMED}


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
    found = dict.fromkeys(names, 0)
    finish(folder, "first")  # imports
    began = time.perf_counter()
    finish(folder, "whole")
    whole, wanted = time.perf_counter() - began, contents(folder / "whole")
    before = set(os.listdir(folder))
    chance = random.Random(0)
    while found["kills"] < kills:
        for _ in range(chance.randint(1, 4)):
            child = start(folder, "out")
            time.sleep(chance.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            found["kills"] += killed
            found["kills_with_finished_blocks"] += killed and any((folder / ".out.work" / BLOCKS).glob("*.safetensors"))
            if not killed:
                break
        there = (folder / "out").exists()  # where it is, a run refuses, and sweeps up
        _, status = os.waitpid(start(folder, "out"), 0)
        found["errors"] += (status == 0) == there
        found["runs"] += 1
        found["resumed_identical"] += (folder / "out").is_dir() and contents(folder / "out") == wanted
        shutil.rmtree(folder / "out", ignore_errors=True)
        found["left_behind"] += set(os.listdir(folder)) != before
        show.print(found)
    return found


def built() -> list[str]:
    """Suites whose experts are there."""
    return [name for name in SUITES if all((suite_dir(name) / place).is_dir() for place in ("base", "experts"))]


def add_results(found: dict[str, Any]) -> None:
    """Put results into the file, beside what other campaigns have found."""
    before = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    write_json(PATH, {**before, **found, "versions": versions(), "hardware": hardware(), "date": now()})


def main() -> None:
    """Read the command line, kill, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many runs to kill")
    parser.add_argument("--only", choices=CAMPAIGNS, help="one of the campaigns alone")
    arguments = parser.parse_args()
    logging.getLogger("epmq").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # threads do not survive a fork
    found: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        campaigns: dict[str, Callable[[], dict[str, Any]]] = {
            "kills": lambda: kill_until(arguments.kills, folder, Console(stderr=True)),
            "disks": lambda: disk_faults(folder),
            "wrong": lambda: wrong_merges.count(folder, folder, recipe),
            "repeats": lambda: {"repeats": repeats(folder)},
            "related": lambda: {"related": {name: wrong_merges.related(name) for name in built()}},
            "batches": lambda: {"batches": {name: halve_real_batches(name, folder) for name in built()}},
        }
        for campaign in [arguments.only] if arguments.only else campaigns:
            found |= campaigns[campaign]()
    add_results(found)


if __name__ == "__main__":
    main()
