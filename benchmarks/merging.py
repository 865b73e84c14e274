"""`python -m benchmarks.merging`: time and memory of merging, beside mergekit on the same files.

A base and three experts in the shape of Llama 3.2 1B, with random weights (bfloat16, `benchmarks.shapes`); each tool
runs as its own command, ours and mergekit's in turn, each with one thread. mergekit trims TIES a tensor at a time, we
over the whole model, so both forms of ours are measured. Writes `benchmarks/results/merging.json`; needs `make peers`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.compare import RESULTS
from benchmarks.peers import Cost, cost_of, peer_python, peer_versions
from benchmarks.shapes import find_shape, tasks, write_models
from epmq.checkpoint import write_json
from epmq.demo.fetch import cache_dir
from epmq.report import hardware, now, versions

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


def ours(root: Path, names: list[str], merge: dict[str, Any], work: Path) -> Cost:
    """Merge with `epmq merge`."""
    experts = [{"name": name, "model": str(root / name)} for name in names]
    recipe = {"base": str(root / "base"), "experts": experts, "merge": merge, "output": str(work / "ours")}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program = Path(sys.executable).parent / "epmq"
    return cost_of([program, "merge", work / "recipe.yaml"])


def theirs(root: Path, names: list[str], merge: dict[str, Any], work: Path) -> Cost:
    """Merge with `mergekit-yaml`."""
    settings = {"weight": 0.3} if merge["merge_method"] == "task_arithmetic" else {"weight": 1.0, "density": DENSITY}
    models = [{"model": str(root / name), "parameters": settings} for name in names]
    config = {**merge, "models": models, "base_model": str(root / "base"), "dtype": "bfloat16"}
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    program = peer_python().parent / "mergekit-yaml"
    return cost_of([program, work / "config.yaml", work / "theirs", "--no-copy-tokenizer"])


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="each tool runs so often; the least time counts")
    parser.add_argument("--quick", action="store_true", help="two layers instead of sixteen; nothing is written")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    name, console = "llama-1b" + "-quick" * arguments.quick, Console(stderr=True)
    shape, root, rows = find_shape(name), cache_dir() / "shapes" / name, []
    write_models(shape, root)
    try:
        for method, (our, their) in METHODS.items():
            costs: dict[str, list[Cost]] = {"ours": [], "mergekit": []}
            for _ in range(arguments.rounds):
                with tempfile.TemporaryDirectory(dir=root) as work:
                    costs["ours"].append(ours(root, tasks(shape), our, Path(work)))
                with tempfile.TemporaryDirectory(dir=root) as work:
                    costs["mergekit"].append(theirs(root, tasks(shape), their, Path(work)))
            best = {tool: min(found, key=lambda cost: cost.cpu_seconds) for tool, found in costs.items()}
            row = {"method": method, "experts": shape.experts, "dtype": "bfloat16", **_row(best)}
            rows.append(row)
            console.print(f"{method}: {row}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if not arguments.quick:
        where = {"versions": versions() | peer_versions(["mergekit", "torch"]), "hardware": hardware(), "date": now()}
        write_json(RESULTS / "merging.json", {"shape": name, "rounds": arguments.rounds, "rows": rows, **where})


def _row(best: dict[str, Cost]) -> dict[str, Any]:
    mine, other = best["ours"], best["mergekit"]
    return {
        **{tool: cost.as_dict() for tool, cost in best.items()},
        "cpu_ratio": round(other.cpu_seconds / mine.cpu_seconds, 2),
        "memory_ratio": round(other.peak_memory_mb / mine.peak_memory_mb, 2),
    }


if __name__ == "__main__":
    main()
