"""What the stages of `device` share: where they measure, how they time it, and the file that rows go to."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import epmq
from benchmarks.records import provenance
from epmq.files import write_json

FILE = "device.json"
CONSOLE = Console(stderr=True, width=160)


class Job:
    """Where and how large to measure, and where the results go.

    Attributes:
        device: what is measured.
        out: folder of the results.
        quick: sizes for a processor.
    """

    def __init__(self, device: str, out: Path, quick: bool) -> None:
        self.device, self.out, self.quick = torch.device(device), out, quick

    def sync(self) -> float:
        """The wall's clock, when the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any], rounds: int) -> list[float]:
        """What some work takes, round by round, after one that does not count."""
        work()
        taken = []
        for _ in range(rounds):
            start = self.sync()
            work()
            taken.append(self.sync() - start)
        return taken

    def put(self, section: str, row: dict[str, Any], key: str | None = None) -> None:
        """Write a section of the results, or with a `key` one row of it, in the place of one with the same name."""
        path = self.out / FILE
        results = json.loads(path.read_text()) if path.exists() else {}
        if key is None:
            results[section] = row
        else:
            others = [other for other in results.get(section, []) if other[key] != row[key]]
            results[section] = [*others, row]
        where = provenance()
        where["versions"]["epmq"] = epmq.__version__  # also where it is not installed
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, {**results, "device": self.device.type, **where})
        CONSOLE.print(f"{section}: {row}", markup=False, highlight=False)

    def tried(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A named row; where measuring fails, it says why."""
        try:
            return {"name": name, **measure()}
        except Exception as error:  # whatever it is, the next row is worth having
            traceback.print_exc()
            return {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
