"""Recipes from plain values: defaults, and what is refused."""

import copy

import pytest
from made_recipes import changed, parent_of, smallest
from pydantic import ValidationError

from epmq.merge_settings import settings_classes
from epmq.quantization.grid import Grid
from epmq.quantize_settings import Quantize
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe


def test_defaults():
    recipe = load_recipe(smallest())
    assert recipe.quantize.block_grid == Grid(4, -1, True) and recipe.format == "pack-quantized"
    assert recipe.merge.arguments() == {"scaling": 0.3} and recipe.quantize.method == "expert_guided"
    assert (recipe.task_weight("one"), recipe.task_weight("two")) == (0.5, 0.5)
    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bsae", "x", "unknown field 'bsae'"),
        ("quantize.bit", 4, "unknown field 'quantize.bit'"),
        ("experts.1.modle", "x", "unknown field 'experts.1.modle'"),
        ("experts.0.calibration.file", "x", "unknown field 'experts.0.calibration.file'"),
        ("base", None, "base: "),
        ("base", 3, "base: "),
        ("experts", [], "experts: "),
        ("experts", "one", "experts: "),
        ("experts.0.name", "a/b", "experts.0.name: "),
        ("experts.0.name", "", "experts.0.name: "),
        ("experts.0.name", "../a", "experts.0.name: "),
        ("experts.1.name", "one", "experts: name used twice: one"),
        ("experts.0.calibration.samples", 0, "experts.0.calibration.samples: "),
        ("merge.method", "nearswap", "merge.method: 'nearswap' is not one of average, task_arithmetic, ties, dare, "),
        ("merge.method", ["ties"], "merge.method: ['ties'] is not one of average, "),
        ("merge", {"method": "task_arithmetic", "scaling": [0.3]}, "merge.scaling: 1 values for 2 experts"),
        ("merge.scaling", "much", "merge.scaling"),
        ("merge", {"method": "average", "weights": [1, 1, 1]}, "merge.weights: 3 values for 2 experts"),
        ("merge", {"method": "average", "scaling": 0.3}, "merge.scaling: average does not use it"),
        ("merge", {"method": "ties", "scaling": [0.3, 0.3]}, "merge.scaling: ties takes one number"),
        ("merge.weights", [1, 1], "merge.weights: task_arithmetic does not use it"),
        ("merge.density", 0.5, "merge.density: task_arithmetic does not use it"),
        ("merge", {"method": "ties", "density": 0}, "merge.density: "),
        ("merge", {"method": "dare", "density": 1.5}, "merge.density: "),
        ("merge", {"method": "ties", "trim": "layer"}, "merge.trim: "),
        ("merge", {"method": "dare", "combine": "average"}, "merge.combine: "),
        ("quantize.bits", 5, "quantize.bits: 5 is not one of 2, 3, 4, 8, 16"),
        ("quantize.bits", "four", "quantize.bits: "),
        ("quantize.group_size", 7, "quantize.group_size: 7 is not one of -1, 32, 64, 128"),
        ("quantize.group_size", 0, "quantize.group_size: 0 is not one of"),
        ("quantize.method", "awq", "quantize.method: "),
        ("quantize.anchor_strength", -0.1, "quantize.anchor_strength: "),
        ("quantize.anchor_strength", 0, "quantize.anchor_strength: "),
        ("quantize.damping", -1, "quantize.damping: "),
        ("quantize.symmetric", "perhaps", "quantize.symmetric: "),
        ("quantize.task_weights", {"one": 1.0}, "quantize.task_weights: needs exactly the tasks one, two"),
        ("quantize.task_weights", {"one": 1, "two": 1, "three": 1}, "quantize.task_weights: needs exactly the tasks"),
        ("quantize.task_weights", {"one": 2, "two": -1}, "quantize.task_weights: must not be negative"),
        ("quantize.task_weights", {"one": 0, "two": 0}, "quantize.task_weights: must not be negative, nor all zero"),
        (
            "quantize",
            {"method": "gptq", "task_weights": {"one": 1, "two": 1}},
            "quantize.task_weights: gptq does not use it",
        ),
        ("format", "gguf", "format: "),
        ("samples", 0, "samples: "),
        ("batch_size", -1, "batch_size: "),
        ("max_length", 0, "max_length: "),
        ("seed", "now", "seed: "),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(ValueError) as error:
        load_recipe(changed(field, value))
    assert f"recipe: {message}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("merge.scaling", float("nan")),
        ("merge.scaling", [0.3, float("inf")]),
        ("quantize.anchor_strength", float("inf")),
        ("quantize.task_weights", {"one": float("nan"), "two": 1.0}),
    ],
)
def test_numbers_that_are_not_finite_are_refused(field, value):
    """One of them would make every merged weight NaN, long before anything notices."""
    with pytest.raises(ValueError, match=field):
        load_recipe(changed(field, value))


def test_weights_that_sum_to_zero_are_refused():
    with pytest.raises(ValueError, match=r"merge.*weights"):
        load_recipe(changed("merge", {"method": "average", "weights": [1, -1]}))


def test_dare_with_ties_takes_one_scaling():
    with pytest.raises(ValueError, match=r"merge.*scaling"):
        load_recipe(changed("merge", {"method": "dare", "combine": "ties", "scaling": [0.3, 0.3]}))


@pytest.mark.parametrize("field", ["base", "experts", "experts.0.name", "experts.1.model"])
def test_a_missing_field_is_named(field):
    recipe = copy.deepcopy(smallest())
    section, leaf = parent_of(recipe, field)
    del section[leaf]
    with pytest.raises(ValueError, match=f"recipe: field '{field}' is missing"):
        load_recipe(recipe)


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(ValueError) as error:
        load_recipe({"experts": [{"name": "one"}], "speed": 1, "quantize": {"bits": 5}})
    for part in ("'base' is missing", "'experts.0.model' is missing", "unknown field 'speed'", "quantize.bits: 5"):
        assert part in str(error.value)


def test_calibration_is_used_by_the_methods_that_look_at_data():
    recipe = smallest()
    calibrates = {
        method: load_recipe({**recipe, "quantize": {"method": method}}).quantize.calibrates
        for method in settings_classes(Quantize)
    }
    assert calibrates == {"none": False, "rtn": False, "gptq": True, "e_pmq": True, "expert_guided": True}
    for expert in recipe["experts"]:
        del expert["calibration"]
    assert load_recipe({**recipe, "quantize": {"method": "rtn"}}).experts[0].calibration is None


def test_task_weights_sum_to_one():
    recipe = load_recipe(changed("quantize.task_weights", {"two": 3, "one": 1}))
    assert (recipe.task_weight("one"), recipe.task_weight("two")) == (0.25, 0.75)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(smallest()).base = "other"


def test_every_field_is_documented():
    schema = Recipe.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    plain = {"experts", "merge", "quantize", "method"}
    for model in models:
        assert model["description"]
        for name, field in model["properties"].items():
            assert name in plain or field.get("description"), name
