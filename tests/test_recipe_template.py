"""`epmq init`'s recipe follows the models of the recipe, unions of settings included."""

from typing import Literal

import yaml
from pydantic import BaseModel, Field

from epmq.recipe import Data, Recipe
from epmq.recipe_file import load_recipe
from epmq.recipe_template import EXAMPLE, WIDTH, _field, recipe_template


class Mean(BaseModel):
    """The plain mean."""

    method: Literal["mean"] = "mean"
    weights: list[float] | None = Field(None, description="one an expert")
    trim: bool = Field(True, description="the same in both")


class Sum(BaseModel):
    """A sum of task vectors."""

    method: Literal["sum"] = "sum"
    scaling: float = Field(0.3, description="factor on each")
    trim: bool = Field(True, description="the same in both")


class Settings(BaseModel):
    merge: Mean | Sum = Field(Sum(), discriminator="method")
    place: Literal["memory", "disk"] = Field("memory", description="where they wait")


def test_every_field_is_in_it_and_explained():
    text = recipe_template()
    for model in (Recipe, Data):
        for name, field in model.model_fields.items():
            [line, *_] = [line for line in text.splitlines() if line.lstrip("# ").startswith(f"{name}:")]
            assert not field.description or "  # " in line or line.rstrip().endswith(":") or " # " in line
    assert all(len(line) <= WIDTH for line in text.splitlines())


def test_it_is_a_recipe_of_defaults():
    content = yaml.safe_load(recipe_template())
    assert load_recipe(content).model_dump() == load_recipe(EXAMPLE).model_dump()


def test_the_other_settings_of_a_union_are_comments():
    lines = [*_field(Settings(), "merge"), *_field(Settings(), "place")]
    assert [" ".join(line.split()) for line in lines] == [
        "merge:",
        "method: sum # mean or sum",
        "scaling: 0.3 # factor on each",
        "trim: true # the same in both",
        "# method: mean # The plain mean.",
        "# weights: # one an expert",
        "place: memory # memory or disk; where they wait",
    ]
