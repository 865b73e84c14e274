"""`python -m benchmarks.speed.device STAGE … [--device cuda]`: what epmq does on an accelerator, and how fast.

`benchmarks/device.sh` runs all stages in less than ten minutes, each with a limit of its own:

* `rates`: matrix products in three precisions, and copies;
* `tests`: those that need a device;
* `equality`: runs of a small model on the processor, and twice on the device;
* `solver`: GPTQ on one layer, beside what its operations take at the rate of a product;
* `llama-1b`, `llama-8b`: whole runs on blocks of these shapes, with random weights in bfloat16;
* `summary`: the tables of what was measured.

Each row is written to `device.json` in the folder of `--out` as soon as it is measured; a row that fails says why, and
the next goes on. `--quick` takes sizes for a processor, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.speed.device_job import CONSOLE, FILE, Job
from benchmarks.speed.device_runs import RUNS, SMALL, recipe_of, whole_runs
from benchmarks.speed.shapes import Shape, tasks, write_models
from benchmarks.speed.solver_worker import GRID, layer, ours
from benchmarks.tables.speed import device_table
from epmq.pipeline import run as pipeline
from epmq.quantization.factor import factorize
from epmq.quantization.gptq import _Block, gptq
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.recording import gpu_of

TESTS = (
    "tests/calibration/test_device.py",
    "tests/models/test_kernels.py",
    "tests/models/test_packed.py",
    "tests/quantization/test_gptq.py",
    "tests/quantization/test_recording.py",
)
# After which the tests are cut off: less than their limit in benchmarks/device.sh.
TESTS_SECONDS = 95
METHODS = ("gptq", "expert_guided")
LAYERS = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))


# --- rates -----------------------------------------------------------------------------------------------------------


def rates(job: Job) -> None:
    """10¹² operations a second in a square product, and 10⁹ bytes a second, read and written, of a copy."""
    size = 512 if job.quick else 8192
    row: dict[str, float] = {"size": size}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        left, right = torch.randn(2, size, size, device=job.device).to(dtype)
        taken = statistics.median(job.seconds(partial(torch.matmul, left, right), 10))
        row[name] = round(2 * size**3 / taken / 1e12, 3)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(1 << (20 if job.quick else 30), device=job.device)
    target = torch.empty_like(source)
    taken = statistics.median(job.seconds(partial(target.copy_, source), 10))
    row["copy_gb"] = round(2 * source.nbytes / taken / 1e9, 1)
    job.put("rates", row)


def known_rates(job: Job) -> dict[str, float]:
    """The rates that `rates` has measured; measured now if it has not."""
    path = job.out / FILE
    if not path.exists() or "rates" not in json.loads(path.read_text()):
        rates(job)
    known: dict[str, float] = json.loads(path.read_text())["rates"]
    return known


# --- tests -----------------------------------------------------------------------------------------------------------


def device_tests(job: Job) -> None:
    """The tests that need a device: how many passed, and the names of what failed or was cut off."""
    cuda, log = job.device.type == "cuda", job.out / "pytest.txt"
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "--timeout=80", *TESTS]
    command += [*(["-m", "gpu"] if cuda else []), *(["-n", "8"] if cuda and find_spec("xdist") else [])]
    start, whole = time.perf_counter(), True
    with log.open("w") as file:
        try:
            environment = {**os.environ, "OMP_NUM_THREADS": "2"}
            subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environment, timeout=TESTS_SECONDS)
        except subprocess.TimeoutExpired:
            whole = False
    outcomes = outcomes_of(log.read_text())
    counts = {kind: sum(outcome == kind.upper() for outcome in outcomes.values()) for kind in ("passed", "skipped")}
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    job.put("tests", {**counts, "failed": failed, "whole": whole, "seconds": round(time.perf_counter() - start, 1)})


def outcomes_of(log: str) -> dict[str, str]:
    """Test → outcome, from what pytest writes with -v, by itself or with workers."""
    outcome, test = "(PASSED|FAILED|ERROR|SKIPPED)", r"tests/\S+?::(\S+)"
    pairs = [(name, found) for found, name in re.findall(rf"{outcome} {test}", log)]
    return dict([*re.findall(rf"{test} {outcome}", log), *pairs])


# --- equality --------------------------------------------------------------------------------------------------------


def equality(job: Job) -> None:
    """Runs of a small model on the processor, and twice on the device: which codes, losses and bytes are the same."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shape = replace(SMALL, layers=1, samples=4) if job.quick else SMALL
        write_models(shape, root)
        for method in METHODS:
            job.put("equality", job.tried(method, partial(_equal, job, shape, root, method)), key="name")


def _equal(job: Job, shape: Shape, root: Path, method: str) -> dict[str, Any]:
    calibration = {task: shape.batches(seed) for seed, task in enumerate(tasks(shape))}
    reports = {}
    for name, device in (("cpu", "cpu"), ("once", job.device.type), ("again", job.device.type)):
        recipe = recipe_of(shape, root, method, root / method / name, device)
        reports[name] = pipeline.run(recipe, calibration=calibration, evaluate=False, progress=False)
    once, again, cpu = (root / method / name for name in ("once", "again", "cpu"))
    files = sorted(file.name for file in once.iterdir() if file.suffix not in (".html", ".md"))
    changed = [
        name for name in files if name != "report.json" and (once / name).read_bytes() != (again / name).read_bytes()
    ]
    solved = ([layer for layer in reports[name]["layers"] if layer["loss"] is not None] for name in ("cpu", "once"))
    pairs = [(one["loss"], other["loss"]) for one, other in zip(*solved)]
    off = [abs(other / one - 1) for one, other in pairs]
    return {
        "equal_codes": round(_equal_share(cpu, once), 6),
        "largest_loss_difference": round(max(off), 6),
        "loss_difference": round(reports["once"]["loss"] / reports["cpu"]["loss"] - 1, 6),
        "within_one_percent": sum(value <= 0.01 for value in off),
        "layers": len(off),
        "changed_files": changed,
    }


def _equal_share(one: Path, other: Path) -> float:
    """Share of the codes that two packed checkpoints have in common."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    same = total = 0
    for name in first:
        if name.endswith("_packed"):
            shape = torch.Size(first[name.replace("_packed", "_shape")].tolist())
            bits = 32 * first[name].shape[1] // shape[1]
            codes = [unpack_from_int32(tensors[name], bits, shape) for tensors in (first, second)]
            same += int((codes[0] == codes[1]).sum())
            total += codes[0].numel()
    return same / total


# --- the solver ------------------------------------------------------------------------------------------------------


def solver(job: Job) -> None:
    """GPTQ on one layer of random weights, a row a shape."""
    rate = known_rates(job)
    for out, columns in LAYERS[:1] if job.quick else LAYERS:
        name = f"{out} × {columns}"
        job.put("solver", job.tried(name, partial(_solve, job, out, columns, rate)), key="name")


def _solve(job: Job, out: int, columns: int, rate: dict[str, float]) -> dict[str, Any]:
    weight, hessian = layer(out, columns, torch.device("cpu"))
    weight, hessian = weight.to(job.device), hessian.to(job.device)
    rounds = 2 if job.quick else 5
    whole = job.seconds(ours(weight, hessian), rounds)
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = factorize(damped)
    parts = {
        "factor": job.seconds(partial(factorize, damped), rounds),
        "codes": job.seconds(partial(gptq, weight, factor, GRID), rounds),
        "scales searched": job.seconds(partial(gptq, weight, factor, GRID, search=True), rounds),
    }
    codes = gptq(weight, factor, GRID)[0].dequantize()
    operations = columns**3 / 3 + out * columns**2
    row: dict[str, Any] = {
        "out": out,
        "in": columns,
        "rounds": rounds,
        "seconds": round(min(whole), 5),
        "median": round(statistics.median(whole), 5),
        "parts": {part: round(min(taken), 5) for part, taken in parts.items()},
        "floor_seconds": round(operations / rate["float32"] / 1e12, 5),
        "over_floor": round(min(whole) / operations * rate["float32"] * 1e12, 2),
        "error": round(float(hessian_loss(codes - weight, hessian).sum() / hessian_loss(weight, hessian).sum()), 7),
    }
    if job.device.type == "cuda":
        row["block"] = job.tried("graph", partial(_graph, job, weight))
    return row


def _graph(job: Job, weight: torch.Tensor) -> dict[str, Any]:
    """Seconds in which the columns of one block are fixed: call by call, and as one recorded graph."""
    with torch.inference_mode():
        block = _Block(256, weight, GRID)
        for buffer in (block.weight, block.compensated, block.scale, block.feedback):
            buffer.copy_(torch.rand_like(buffer))
        calls = min(job.seconds(block.call, 5))
        gpu = gpu_of(weight.device)
        assert gpu, "no recordings on this stream"
        with gpu.aside():
            block.call()
        start = job.sync()
        replayed = gpu.record(block.call)
        record = job.sync() - start
        replay = min(job.seconds(replayed, 5))
    return {"columns": 256, "calls": round(calls, 6), "record": round(record, 6), "replay": round(replay, 6)}


# --- the command -----------------------------------------------------------------------------------------------------


def _runs(job: Job, name: str) -> None:
    whole_runs(job, name, known_rates(job), METHODS)


def summary(job: Job) -> None:
    """Show what there is as the tables show it."""
    print(device_table(json.loads((job.out / FILE).read_text())))


STAGES: dict[str, Callable[[Job], None]] = {
    "rates": rates,
    "tests": device_tests,
    "equality": equality,
    "solver": solver,
    **{name: partial(_runs, name=name) for name in RUNS},
    "summary": summary,
}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.device", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of device.json; benchmarks/results by default"
    )
    parser.add_argument("--quick", action="store_true", help="sizes for a processor")
    arguments = parser.parse_args()
    job = Job(arguments.device, arguments.out, arguments.quick)
    for stage in arguments.stages:
        start = time.perf_counter()
        STAGES[stage](job)
        CONSOLE.print(f"{stage}: {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
