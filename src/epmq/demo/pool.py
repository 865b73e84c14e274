"""Recipes over a pool as `epmq.demo.build` lays it out, and the comparison that the demo and the suites share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epmq.spec import Recipe, load_recipe


def data_file(root: Path, task: str, split: str) -> Path:
    """The file of one split, `.jsonl` or `.npz`.

    Raises:
        FileNotFoundError: there is neither.
    """
    for ending in (".jsonl", ".npz"):
        path = root / "data" / task / f"{split}{ending}"
        if path.exists():
            return path
    raise FileNotFoundError(f"{root / 'data' / task}: no {split}.jsonl and no {split}.npz")


def pool_recipe(
    root: Path,
    tasks: Sequence[str],
    *,
    max_length: int | None,
    split: str = "test",
    test_samples: int | None = None,
    **fields: Any,
) -> Recipe:
    """A recipe for the experts of a pool: calibrated on training data, evaluated on `split`.

    Args:
        root: the pool.
        tasks: names of its experts, in order.
        max_length: tokens a text is cut to.
        split: what to evaluate on.
        test_samples: examples a task to evaluate on; all if None.
        fields: further fields of the recipe, such as `merge`, `quantize`, `output`.
    """
    experts = [
        {
            "name": task,
            "model": str(root / "experts" / task),
            "calibration": {"path": str(data_file(root, task, "train"))},
            "evaluation": {"path": str(data_file(root, task, split)), "samples": test_samples},
        }
        for task in tasks
    ]
    return load_recipe({"base": str(root / "base"), "experts": experts, "max_length": max_length, **fields})


def training_records(root: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What was recorded when each expert was trained."""
    return {task: json.loads((root / "experts" / task / "training.json").read_text()) for task in tasks}
