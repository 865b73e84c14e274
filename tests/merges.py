"""Recipes over folders of small checkpoints, for tests of what is merged."""

from pathlib import Path
from typing import Any

import torch
from checkpoints import edit_weights
from conftest import padded_batches

from epmq.merging.compatibility import open_experts
from epmq.merging.experts import ExpertSet
from epmq.recipe_file import load_recipe

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
AVERAGE = {"merge": {"method": "average"}, "quantize": {"method": "none"}}


def recipe_of(folder: Path, *experts: str, **fields: Any) -> dict[str, Any]:
    """A recipe over `base` and `experts` (by default `one` and `two`) in a folder."""
    names = experts or ("one", "two")
    models = [{"name": name.partition("/")[0], "model": str(folder / name)} for name in names]
    return {"base": str(folder / "base"), "experts": models, "output": str(folder / "out"), **fields}


def open_recipe(content: dict[str, Any]) -> ExpertSet:
    """Base and experts of a recipe."""
    recipe = load_recipe(content)
    return open_experts(recipe.base, recipe.experts, recipe.tokenizer, recipe.config)


def open_folder(folder: Path, *experts: str, **fields: Any) -> ExpertSet:
    """`base` and `experts` of a folder."""
    return open_recipe(recipe_of(folder, *experts, **fields))


def batches() -> dict[str, Any]:
    """Calibration batches of two experts, not equally many."""
    return {"one": padded_batches(2), "two": padded_batches(1)}


def set_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put other tensors into a checkpoint, or take some out (None); `__` stands for a dot."""
    edit_weights(
        folder, **{name: None if tensor is None else lambda old, new=tensor: new for name, tensor in tensors.items()}
    )
