"""Recipes over a pool of base, data and experts as `epmq.demo.build` lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epmq.demo.build import split_file
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe


def pool_recipe(
    root: Path,
    tasks: Sequence[str],
    *,
    max_length: int | None,
    split: str = "test",
    test_samples: int | None = None,
    data: dict[str, Any] | None = None,
    **fields: Any,
) -> Recipe:
    """A recipe for the experts of a pool: calibrated on training data, evaluated on `split`.

    Args:
        root: the pool.
        tasks: names of its experts, in order.
        max_length: tokens a text is cut to.
        split: what to evaluate on.
        test_samples: examples a task to evaluate on; all if None.
        data: further fields of calibration and evaluation data, such as `pack`.
        fields: further fields of the recipe, such as `merge`, `quantize`, `output`.
    """

    def expert(task: str) -> dict[str, Any]:
        train, test = (str(split_file(root / "data" / task, name)) for name in ("train", split))
        return {
            "name": task,
            "model": str(root / "experts" / task),
            "calibration": {"path": train, **(data or {})},
            "evaluation": {"path": test, "samples": test_samples, **(data or {})},
        }

    experts = [expert(task) for task in tasks]
    return load_recipe({"base": str(root / "base"), "experts": experts, "max_length": max_length, **fields})
