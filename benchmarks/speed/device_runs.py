"""Whole runs on an accelerator, for `device`: models with random weights, seconds by phase, memory, operations."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.device_job import Job
from benchmarks.speed.shapes import LLAMA, SHAPES, WATCHED, Clock, Shape, tasks, write_models
from benchmarks.speed.solver_worker import GRID
from epmq.calibration import engine, teacher
from epmq.pipeline import prepare
from epmq.pipeline import run as pipeline

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


def recipe_of(shape: Shape, root: Path, method: str, out: Path, device: str) -> dict[str, Any]:
    return {
        "base": str(root / "base"),
        "experts": [{"name": task, "model": str(root / task)} for task in tasks(shape)],
        "merge": {"method": "task_arithmetic"},
        "quantize": {"method": method, "bits": GRID.bits, "group_size": GRID.group_size},
        "output": str(out),
        "device": device,
    }


class DeviceClock(Clock):
    """Waits for the device whenever a phase begins or ends, so that its work counts where it was asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job
        super().__init__()

    def _count(self) -> None:
        self._job.sync()
        super()._count()


def whole_runs(job: Job, name: str, rate: dict[str, float], methods: Sequence[str]) -> None:
    """Whole runs on a shape, a row a method; `rate` holds the rates of products."""
    shape = RUNS[name]
    if job.quick:
        shape = replace(SMALL, layers=2, samples=4, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=_roomy()) as folder:
        root = Path(folder)
        start = job.sync()
        write_models(shape, root, job.device.type)
        made = round(job.sync() - start, 1)
        for method in methods:
            measured = job.tried(f"{name}, {method}", partial(_whole_run, job, shape, root, method, rate))
            job.put("runs", {**measured, "shape": name, "method": method, "models_seconds": made}, key="name")
            shutil.rmtree(root / "out", ignore_errors=True)


def _roomy() -> str | None:
    """A folder in memory, if it has room for the models; None for the usual one on a disk."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 32 << 30 else None


def _whole_run(job: Job, shape: Shape, root: Path, method: str, rate: dict[str, float]) -> dict[str, Any]:
    recipe = recipe_of(shape, root, method, root / "out", job.device.type)
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
