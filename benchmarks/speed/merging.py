"""`python -m benchmarks.speed.merging`: time and memory of merging, beside mergekit on the same files.

A base and three experts in the shape of Llama 3.2 1B, with random weights (bfloat16, `shapes`); each tool
runs as its own command, ours and mergekit's in turn, each with one thread. mergekit trims TIES a tensor at a time, we
over the whole model, so both forms of ours are measured, beside the one of theirs. The least that a merge can take, the
import of the libraries and copying the bytes, is measured by itself. Writes `benchmarks/results/merging.json`; needs
`make peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks import RESULTS
from benchmarks.records import provenance
from benchmarks.speed.peers import Cost, cost_of, peer_python, peer_versions
from benchmarks.speed.shapes import find_shape, tasks, write_models
from epmq.files import cache_dir, write_json
from epmq.runtime import now

FILE = "merging.json"
DENSITY = 0.2
# Ours, and what mergekit calls the same.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "task_arithmetic": ({"method": "task_arithmetic", "scaling": 0.3}, {"merge_method": "task_arithmetic"}),
    "ties, trim by tensor": (
        {"method": "ties", "density": DENSITY, "trim": "tensor"},
        {"merge_method": "ties"},
    ),
    "ties, trim over the model": (
        {"method": "ties", "density": DENSITY, "trim": "model"},
        {"merge_method": "ties"},
    ),
}
# Reads all weights and writes a checkpoint of their size, which does not stay in the system's cache.
COPY = """
import os, sys
from pathlib import Path
buffer = bytearray(1 << 23)
with open(sys.argv[2], "wb", buffering=0) as out:
    for file in sorted(Path(sys.argv[1]).glob("*/*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while size := source.readinto(buffer):
                if file.parent.name == "base":
                    out.write(memoryview(buffer)[:size])
                    os.fsync(out.fileno())
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
"""


def ours(root: Path, names: list[str], merge: dict[str, Any], work: Path) -> Cost:
    """Merge with `epmq merge`."""
    experts = [{"name": name, "model": str(root / name)} for name in names]
    recipe = {"base": str(root / "base"), "experts": experts, "merge": merge, "output": str(work / "ours")}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program = Path(sys.executable).parent / "epmq"
    return cost_of([program, "merge", work / "recipe.yaml"])


def merge_command(
    root: Path, names: list[str], merge: dict[str, Any], work: Path, dtype: str = "bfloat16"
) -> list[str | Path]:
    """The command that merges with `mergekit-yaml`."""
    settings = {"weight": 0.3} if merge["merge_method"] == "task_arithmetic" else {"weight": 1.0, "density": DENSITY}
    models = [{"model": str(root / name), "parameters": settings} for name in names]
    config = {**merge, "models": models, "base_model": str(root / "base"), "dtype": dtype}
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    program = peer_python().parent / "mergekit-yaml"
    return [program, work / "config.yaml", work / "theirs", "--no-copy-tokenizer"]


def floor(root: Path, model_class: str, work: Path) -> dict[str, float]:
    """CPU seconds that a merge takes before it computes, if it asks transformers for the model's class."""
    imports = f"import torch, accelerate; from transformers import {model_class}"
    return {
        "import": round(cost_of([sys.executable, "-c", imports]).cpu_seconds, 2),
        "read and write": round(cost_of([sys.executable, "-c", COPY, root, work / "copy"]).cpu_seconds, 2),
    }


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.merging", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="each tool runs so often; the least time counts")
    parser.add_argument("--quick", action="store_true", help="two layers instead of sixteen; nothing is written")
    parser.add_argument("--ours", action="store_true", help="mergekit's figures are kept, ours measured anew")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    name, console = "llama-1b" + "-quick" * arguments.quick, Console(stderr=True)
    shape, root, rows = find_shape(name), cache_dir() / "shapes" / name, []
    before: dict[str, Any] = {"rows": [], "peer_date": now()}
    if arguments.ours:
        before = json.loads((RESULTS / FILE).read_text())
    measured = {METHODS[row["method"]][1]["merge_method"]: [Cost(**row["mergekit"])] for row in before["rows"]}
    write_models(shape, root)
    try:
        with tempfile.TemporaryDirectory(dir=root) as work:
            least = floor(root, shape.model_class, Path(work))
        console.print(f"floor: {least}")
        for method, (our, their) in METHODS.items():
            costs, other = [], their["merge_method"]
            for _ in range(arguments.rounds):
                with tempfile.TemporaryDirectory(dir=root) as work:
                    costs.append(ours(root, tasks(shape), our, Path(work)))
                if not arguments.ours and len(measured.setdefault(other, [])) < arguments.rounds:
                    with tempfile.TemporaryDirectory(dir=root) as work:
                        measured[other].append(cost_of(merge_command(root, tasks(shape), their, Path(work))))
            best = {"ours": costs, "mergekit": measured[other]}
            row = _row({tool: min(runs, key=lambda cost: cost.cpu_seconds) for tool, runs in best.items()})
            rows.append({"method": method, "experts": shape.experts, "dtype": "bfloat16", **row})
            console.print(f"{method}: {row}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if not arguments.quick:
        where = provenance() | {"peer_date": before["peer_date"]}
        where["versions"] |= peer_versions(["mergekit", "torch"])
        results = {"shape": name, "rounds": arguments.rounds, "floor_cpu_seconds": least, "rows": rows}
        write_json(RESULTS / FILE, results | where)


def _row(best: dict[str, Cost]) -> dict[str, Any]:
    mine, other = best["ours"], best["mergekit"]
    return {
        **{tool: cost.as_dict() for tool, cost in best.items()},
        "cpu_ratio": round(other.cpu_seconds / mine.cpu_seconds, 2),
        "memory_ratio": round(other.peak_memory_mb / mine.peak_memory_mb, 2),
    }


if __name__ == "__main__":
    main()
