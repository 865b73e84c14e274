"""Recipes as YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epmq.errors import MissingError
from epmq.files import read_yaml
from epmq.recipe import Data, Recipe, parse_recipe


def load_recipe(source: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """Read a recipe from a YAML file or a dict. Relative paths in a file are relative to that file.

    Raises:
        MissingError: there is no such file.
        InputError: not a recipe; every offending field is named, with what it should be.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, dict):
        return parse_recipe(source)
    path = Path(source)
    if not path.is_file():
        raise MissingError(f"{path}: no such recipe file")
    return _with_paths(parse_recipe(read_yaml(path, "a recipe"), str(path)), path.parent)


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Paths that exist relative to the recipe's folder are made so; anything else (Hub ids) stays as it is."""

    def fix(value: str | None) -> str | None:
        return str(folder / value) if value and (folder / value).exists() else value

    def fix_data(data: Data | None) -> Data | None:
        return data and data.model_copy(update={"path": fix(data.path), "dataset": fix(data.dataset)})

    experts = [
        expert.model_copy(
            update={
                "model": fix(expert.model),
                "head": fix(expert.head),
                "calibration": fix_data(expert.calibration),
                "evaluation": fix_data(expert.evaluation),
            }
        )
        for expert in recipe.experts
    ]
    return recipe.model_copy(update={"base": fix(recipe.base), "experts": experts})
