"""Recipes as plain values; nothing that they name is there."""

import copy
from typing import Any


def smallest(**fields: Any) -> dict[str, Any]:
    """The smallest recipe there is, with top-level fields on top."""
    experts = [{"name": name, "model": name, "calibration": {"path": f"{name}.jsonl"}} for name in ("one", "two")]
    return {"base": "base", "experts": experts, **fields}


def parent_of(recipe: dict[str, Any], path: str) -> tuple[Any, str]:
    """The section of a recipe that holds a field, such as `experts.0.name`, and the field's own name."""
    *parents, leaf = path.split(".")
    section: Any = recipe
    for parent in parents:
        section = section[int(parent)] if parent.isdigit() else section[parent]
    return section, leaf


def changed(path: str, value: Any) -> dict[str, Any]:
    """The smallest recipe with one field set."""
    recipe = copy.deepcopy(smallest(merge={}, quantize={}))
    section, leaf = parent_of(recipe, path)
    section[leaf] = value
    return recipe
