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
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console

import epmq
from benchmarks import RESULTS, ROOT
from benchmarks.records import provenance
from benchmarks.speed.shapes import LLAMA, SHAPES, WATCHED, Clock, Shape, tasks, write_models
from benchmarks.speed.solver_worker import GRID, layer, ours
from benchmarks.tables.speed import device_table
from epmq.calibration import engine, teacher
from epmq.files import write_json
from epmq.pipeline import prepare
from epmq.pipeline import run as pipeline
from epmq.quantization.factor import factorize
from epmq.quantization.gptq import _Block, gptq
from epmq.quantization.hessian import hessian_loss

FILE = "device.json"
METHODS = ("gptq", "expert_guided")
LAYERS = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))
# What takes time on the processor, or on the way to the device, beside what `shapes` watches.
HOST: tuple[tuple[Any, str, str], ...] = (
    (prepare, "check_relation", "relation"),
    (pipeline, "inputs_of", "hash"),
    (engine, "materialize", "to the device"),
    (engine, "load_outside", "to the device"),
    (teacher, "materialize", "to the device"),
    (teacher, "load_outside", "to the device"),
)
VOCABULARY = 32000
RUNS = {
    "llama-1b": replace(
        SHAPES["llama-1b"],
        config={**SHAPES["llama-1b"].config, "vocab_size": VOCABULARY},
        layers=8,
        samples=32,
        tokens=1024,
    ),
    "llama-8b": Shape(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "vocab_size": VOCABULARY,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        layers=3,
        experts=3,
        samples=32,
        dtype=torch.bfloat16,
        tokens=1024,
    ),
}
SMALL = Shape(
    "LlamaForCausalLM",
    {
        **LLAMA,
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    layers=4,
    experts=3,
    samples=16,
    tokens=64,
)
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
            return {"name": name, "error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


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
    """The tests that need a device: how many passed, and the first line of what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        workers = ["-n", "8"] if job.device.type == "cuda" and _has("xdist") else []
        marked = ["-m", "gpu"] if job.device.type == "cuda" else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/calibration/test_device.py",
            "tests/quantization/test_gptq.py",
        ]
        command += [*marked, *workers, "-q", "--tb=short", f"--junitxml={report}"]
        start = time.perf_counter()
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        (job.out / "tests.log").write_text(output)
        cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    failed = {case.get("name", ""): fault for case in cases for fault in _fault(case)}
    skipped = sum(case.find("skipped") is not None for case in cases)
    row = {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}
    job.put("tests", {**row, "seconds": round(time.perf_counter() - start, 1)})


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _fault(case: ElementTree.Element) -> Iterator[str]:
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            yield (found.get("message") or kind).splitlines()[0][:200]
            return


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
        recipe = _recipe(shape, root, method, root / method / name, device)
        reports[name] = pipeline.run(recipe, calibration=calibration, evaluate=False, progress=False)
    once, again, cpu = (root / method / name for name in ("once", "again", "cpu"))
    files = sorted(file.name for file in once.iterdir() if file.suffix not in (".html", ".md"))
    changed = [
        name for name in files if name != "report.json" and (once / name).read_bytes() != (again / name).read_bytes()
    ]
    pairs = [(one["loss"], other["loss"]) for one, other in zip(*(reports[name]["layers"] for name in ("cpu", "once")))]
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
            codes = [unpack_from_int32(tensors[name], GRID.bits, shape) for tensors in (first, second)]
            same += int((codes[0] == codes[1]).sum())
            total += codes[0].numel()
    return same / total


def _recipe(shape: Shape, root: Path, method: str, out: Path, device: str) -> dict[str, Any]:
    return {
        "base": str(root / "base"),
        "experts": [{"name": task, "model": str(root / task)} for task in tasks(shape)],
        "quantize": {"method": method, "bits": GRID.bits, "group_size": GRID.group_size},
        "output": str(out),
        "device": device,
    }


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
        calls = min(job.seconds(block.run, 5))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block.run()
        torch.cuda.current_stream().wait_stream(stream)
        start = job.sync()
        with torch.cuda.graph(graph):
            block.run()
        record = job.sync() - start
        replay = min(job.seconds(graph.replay, 5))
    return {"columns": 256, "calls": round(calls, 6), "record": round(record, 6), "replay": round(replay, 6)}


# --- whole runs ------------------------------------------------------------------------------------------------------


class DeviceClock(Clock):
    """Waits for the device whenever a phase begins or ends, so that its work counts where it was asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job
        super().__init__()

    def _count(self) -> None:
        self._job.sync()
        super()._count()


def whole_runs(job: Job, name: str) -> None:
    """Whole runs on a shape, a row a method."""
    rate, shape = known_rates(job), RUNS[name]
    if job.quick:
        shape = replace(SMALL, layers=2, samples=4, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=_roomy()) as folder:
        root = Path(folder)
        start = job.sync()
        write_models(shape, root, job.device.type)
        made = round(job.sync() - start, 1)
        for method in METHODS:
            measured = job.tried(f"{name}, {method}", partial(_whole_run, job, shape, root, method, rate))
            job.put("runs", {**measured, "shape": name, "method": method, "models_seconds": made}, key="name")
            shutil.rmtree(root / "out", ignore_errors=True)


def _roomy() -> str | None:
    """A folder in memory, if it has room for the models; None for the usual one on a disk."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 32 << 30 else None


def _whole_run(job: Job, shape: Shape, root: Path, method: str, rate: dict[str, float]) -> dict[str, Any]:
    recipe = _recipe(shape, root, method, root / "out", job.device.type)
    calibration = {task: shape.batches(seed) for seed, task in enumerate(tasks(shape))}
    cuda = job.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    clock, start = DeviceClock(job), job.sync()
    with ExitStack() as stack:
        for owner, function, phase in (*WATCHED, *HOST):
            stack.enter_context(clock.watch(owner, function, phase))
        report = pipeline.run(recipe, calibration=calibration, evaluate=False, progress=False)
    total, phases = job.sync() - start, clock.read()
    operations = count_operations(report["layers"], shape.experts, method != "gptq")
    computed = sum(phases.get(phase, 0.0) for phase in ("forward", "moments", "targets", "solve"))
    return {
        "blocks": shape.layers,
        "experts": shape.experts,
        "tokens": shape.experts * shape.tokens_a_task,
        "parameters": sum(size.numel() for size in shape.stored().values()),
        "seconds": round(total, 1),
        "phases": phases,
        "device_peak_mb": round(torch.cuda.max_memory_allocated(job.device) / 1e6, 1) if cuda else None,
        "device_reserved_mb": round(torch.cuda.max_memory_reserved(job.device) / 1e6, 1) if cuda else None,
        "peak_memory_mb": report["peak_memory_mb"],
        "operations": {part: round(count / 1e12, 3) for part, count in operations.items()},
        "computing_seconds": round(computed, 1),
        "over_float32": round(computed / sum(operations.values()) * rate["float32"] * 1e12, 2),
        "over_bfloat16": round(computed / sum(operations.values()) * rate["bfloat16"] * 1e12, 2),
        "files_in_memory": _roomy() is not None,
        "loss": report["loss"],
        "rounded": sum(row["rounded"] for row in report["layers"]),
        "notes": report["notes"],
    }


def count_operations(layers: list[dict[str, Any]], experts: int, guided: bool) -> dict[str, float]:
    """Operations that a run on layers of these shapes takes, two a product of numbers, without attention.

    Args:
        layers: of a report.
        experts: how many.
        guided: whether it is expert-guided without heads: features where no layer aims at the stream.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in layers:
        block = re.split(r"(?<=\.\d)\.|(?<=\.\d\d)\.", row["name"], maxsplit=1)[0]
        groups.setdefault(f"{block}.{row['group']}", []).append(row)
    parts = dict.fromkeys(("forward", "moments", "targets", "codes"), 0.0)
    for rows in groups.values():
        out, width, tokens = sum(row["shape"][0] for row in rows), rows[0]["shape"][1], rows[0]["tokens"]
        parts["forward"] += (2 if guided else 1) * 2 * tokens * out * width
        parts["moments"] += tokens * width**2
        parts["codes"] += width**3 / 3 + out * width**2
        if guided:
            parts["moments"] += 2 * tokens * width * (out if rows[0]["aims"] else width)
            products = 1 if rows[0]["aims"] else 1 + experts  # with the anchor; with every expert's weights
            parts["targets"] += 2 * out * width**2 * (products + 1)  # two triangular solves
    return parts


# --- the command -----------------------------------------------------------------------------------------------------


def summary(job: Job) -> None:
    """Show what there is as the tables show it."""
    print(device_table(json.loads((job.out / FILE).read_text())))


STAGES: dict[str, Callable[[Job], None]] = {
    "rates": rates,
    "tests": device_tests,
    "equality": equality,
    "solver": solver,
    **{name: partial(whole_runs, name=name) for name in RUNS},
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
