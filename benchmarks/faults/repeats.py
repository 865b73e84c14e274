"""Whether the same recipe gives the same bytes, whatever the threads, the order of tasks and the batch size."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.suites.build import suite_dir
from benchmarks.suites.pool import pool_recipe
from epmq.models.checkpoint import SINGLE
from epmq.pipeline import run as pipeline

# Share of the largest weight that is less than a step of a grid.
STEP = 1e-2
# Runs of real models: calibration examples a task, batch sizes and methods.
SAMPLES, SIZES, METHODS = 64, (32, 16), ("gptq", "expert_guided")
Examples = dict[str, list[dict[str, Tensor]]]


def repeat(
    finish: Callable[..., None], folder: Path, recipe: dict[str, Any], examples: Examples
) -> dict[str, dict[str, float]]:
    """Do a run again and again, with one circumstance changed each time.

    Args:
        finish: does a recipe on calibration batches.
        folder: where outputs go.
        recipe, examples: the run; written without packing.

    Returns:
        circumstance → share of the weights that have another code, and the largest difference over the largest weight.
    """
    recipe = {**recipe, "format": "dequantized"}
    before, state = torch.get_num_threads(), torch.get_rng_state()
    runs: dict[str, Callable[[str], None]] = {
        "first": lambda name: finish({**recipe, "output": name}, examples),
        "again": lambda name: finish({**recipe, "output": name}, examples),
        "tasks in another order": lambda name: finish(
            {**recipe, "output": name, "experts": recipe["experts"][::-1]}, dict(reversed(examples.items()))
        ),
        "one thread": lambda name: _with_threads(1, lambda: finish({**recipe, "output": name}, examples)),
        "two threads": lambda name: _with_threads(2, lambda: finish({**recipe, "output": name}, examples)),
        "half the batch size": lambda name: finish({**recipe, "output": name}, _halved(examples)),
    }
    differences: dict[str, dict[str, float]] = {}
    for number, (name, run) in enumerate(runs.items()):
        run(str(folder / f"repeat-{number}"))
        if number:
            differences[name] = difference(folder / "repeat-0" / SINGLE, folder / f"repeat-{number}" / SINGLE)
    torch.set_num_threads(before)
    differences["global random state"] = {"changed": float(not torch.equal(state, torch.get_rng_state()))}
    return differences


def halve_real_batches(suite: str, folder: Path) -> dict[str, dict[str, float]]:
    """What half the batch size does to the codes of a suite's real models, by method; as `repeat` returns it."""
    module, differences = importlib.import_module(f"benchmarks.suites.{suite}"), {}
    shared: dict[str, Any] = {"max_length": module.MAX_LENGTH, "data": getattr(module, "DATA", None)}
    shared["format"] = "dequantized"
    for method in METHODS:
        outputs = [folder / f"{suite}-{method}-{size}" for size in SIZES]
        for size, output in zip(SIZES, outputs):
            settings: dict[str, Any] = {"quantize": {"method": method}, "samples": SAMPLES, "batch_size": size}
            recipe = pool_recipe(suite_dir(suite), list(module.TASKS), output=str(output), **shared, **settings)
            pipeline.run(recipe, progress=False, evaluate=False)
        differences[method] = difference(*(output / SINGLE for output in outputs))
    return differences


def difference(one: Path, other: Path) -> dict[str, float]:
    """How two checkpoints of the same tensors differ; what is less than a step of any grid does not count."""
    first, second = load_file(one), load_file(other)
    pairs = [(tensor.double(), second[name].double()) for name, tensor in first.items()]
    differ = sum(int(((a - b).abs() > STEP * a.abs().max()).sum()) for a, b in pairs)
    largest = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)
    return {"differing": differ / sum(a.numel() for a, _ in pairs), "largest": largest}


def _with_threads(count: int, run: Callable[[], None]) -> None:
    torch.set_num_threads(count)
    run()


def _halved(examples: Examples) -> Examples:
    return {task: [_half(batch, part) for batch in batches for part in (0, 1)] for task, batches in examples.items()}


def _half(batch: dict[str, Tensor], part: int) -> dict[str, Tensor]:
    return {name: tensor.chunk(2)[part] for name, tensor in batch.items()}
