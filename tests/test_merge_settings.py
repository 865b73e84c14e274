"""Settings of merge methods: what is refused, the order of experts, and names that other programs have."""

import pytest
from made_recipes import smallest

from epmq.merge_settings import ALIASES, Merge, settings_classes
from epmq.recipe import Recipe
from epmq.recipe_file import load_recipe


def recipe_with(*experts: str, **merge) -> Recipe:
    listed = [{"name": name, "model": name} for name in experts]
    return load_recipe(smallest(experts=listed, merge=merge, quantize={"method": "none"}))


@pytest.mark.parametrize(
    ("merge", "count", "message"),
    [
        ({"method": "slerp"}, 1, "merge.method: slerp merges two experts, not 1"),
        ({"method": "slerp"}, 3, "merge.method: slerp merges two experts, not 3"),
        ({"method": "slerp", "t": 1.5}, 2, "merge.t: "),
        ({"method": "slerp", "scaling": 0.3}, 2, "merge.scaling: slerp does not use it"),
        ({"method": "model_stock"}, 1, "merge.method: model_stock merges two experts or more, not 1"),
        ({"method": "karcher", "weights": [1.0]}, 2, "merge.weights: 1 values for 2 experts"),
        ({"method": "karcher", "weights": [1.0, -1.0]}, 2, "merge.weights: must not be negative, nor all zero"),
        ({"method": "karcher", "steps": -1}, 2, "merge.steps: "),
        ({"method": "consensus", "agreement": 3}, 2, "merge.agreement: 3 tasks, but the experts are 2"),
        ({"method": "consensus"}, 1, "merge.agreement: 2 tasks, but the experts are 1"),
        ({"method": "consensus", "agreement": 0}, 2, "merge.agreement: "),
        ({"method": "consensus", "scaling": [0.3, 0.3]}, 2, "merge.scaling: "),
        ({"method": "breadcrumbs", "smallest": 0.9, "largest": 0.1}, 2, "merge: smallest, largest: 0.9 and 0.1 leave"),
        ({"method": "della", "density": 0.9}, 2, "merge: window: entries would be kept with chances of 0.75 to 1.05"),
        ({"method": "della", "scaling": [0.3, 0.3]}, 2, "merge: scaling: della with combine: ties takes one number"),
    ],
)
def test_what_makes_no_sense_is_refused(merge, count, message):
    with pytest.raises(ValueError) as error:
        recipe_with(*"abc"[:count], **merge)
    assert str(error.value).startswith(f"recipe: {message}") and "\n" not in str(error.value)


def test_the_order_in_which_experts_are_listed_makes_no_difference():
    for merge in ({"method": "slerp", "t": 0.7}, {"method": "karcher", "weights": [3.0, 7.0]}):
        listed = recipe_with("a", "b", **merge)
        turned = {name: 0.3 if name == "t" else value[::-1] for name, value in merge.items() if name != "method"}
        other = recipe_with("b", "a", method=merge["method"], **turned)
        assert listed.ordered() == other.ordered() == other.ordered().ordered() == listed


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_its_method_with_what_it_implies(alias):
    settings = recipe_with("a", "b", method=alias).merge
    assert settings == recipe_with("a", "b", **ALIASES[alias]).merge
    assert alias not in settings_classes(Merge) and settings.method in settings_classes(Merge)


def test_what_is_set_comes_before_what_an_alias_implies():
    settings = recipe_with("a", "b", method="ties_merging", scaling=0.5, density=0.1).merge
    assert settings == recipe_with("a", "b", method="ties", scaling=0.5, density=0.1, agreed="sum").merge
    with pytest.raises(ValueError, match=r"merge\.scaling: average does not use it"):
        recipe_with("a", "b", method="linear", scaling=0.5)
