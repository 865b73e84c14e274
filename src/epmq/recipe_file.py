"""Recipes as YAML files."""

from pathlib import Path
from typing import Any, TypeVar

from epmq.errors import MissingError
from epmq.files import read_yaml
from epmq.recipe import Recipe, parse_recipe
from epmq.storage_settings import Strict

Model = TypeVar("Model", bound=Strict)


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

    def fix(part: Model, *fields: str) -> Model:
        paths = {name: folder / path for name in fields if (path := getattr(part, name))}
        return part.model_copy(update={name: str(path) for name, path in paths.items() if path.exists()})

    experts = []
    for expert in recipe.experts:
        data = {use: getattr(expert, use) for use in ("calibration", "evaluation")}
        data = {use: one and fix(one, "path", "dataset") for use, one in data.items()}
        experts.append(fix(expert, "model", "head").model_copy(update=data))
    return fix(recipe, "base").model_copy(update={"experts": experts})
