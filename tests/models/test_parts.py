"""Names of tensors with wrappers around modules, and of parts of a model."""

from __future__ import annotations

import pytest

from epmq.models.parts import place, unwrapped, wrappers

NAMES = ["model.layers.0.mlp.up.weight", "model.norm.weight", "lm_head.weight"]
MODEL = ["text.layers.0.mlp.up.weight", "text.layers.1.mlp.up.weight", "text.norm.weight", "lm_head.weight"]
SEES = [name.replace("text.", "vision.") for name in MODEL[:3]]


@pytest.mark.parametrize(
    ("around", "found"),
    [
        ("_orig_mod.", ["_orig_mod"]),
        ("module.", ["module"]),
        ("module._orig_mod.", ["module", "_orig_mod"]),
        ("base_model.model.", ["base_model", "model"]),
        ("_fsdp_wrapped_module.module.", ["_fsdp_wrapped_module", "module"]),
    ],
)
def test_wrappers_are_taken_off_the_front(around, found):
    names = unwrapped([around + name for name in NAMES])
    assert names == {name: around + name for name in NAMES} and wrappers(names) == found


def test_wrappers_are_taken_off_between_modules():
    names = unwrapped(["layers.0._orig_mod.mlp._checkpoint_wrapped_module.up.weight", "norm.weight"])
    assert list(names) == ["layers.0.mlp.up.weight", "norm.weight"]
    assert wrappers(names) == ["_orig_mod", "_checkpoint_wrapped_module"]


def test_what_is_no_wrapper_stays():
    for names in (NAMES, [*NAMES, "module.bias"], ["_orig_mod.a", "a"], []):
        assert list(unwrapped(names)) == names and not wrappers(unwrapped(names))


@pytest.mark.parametrize(
    ("names", "exchange"),
    [
        (["layers.0.mlp.up.weight", "norm.weight"], ("", "text.")),
        (["model.layers.1.mlp.up.weight"], ("model.", "text.")),
        (["a.model.layers.1.mlp.up.weight", "other.weight"], ("a.model.", "text.")),
        (["norm.weight", "head.dense.weight"], None),  # too little to tell
        (["blocks.0.mlp.down.weight"], None),
    ],
)
def test_a_part_is_placed_by_the_names_of_numbered_modules(names, exchange):
    assert place(names, MODEL) == exchange


def test_of_several_places_shapes_numbers_and_a_known_class_decide_else_none_does():
    model, layer = [*MODEL, *SEES, "vision.patches.weight"], "layers.0.mlp.up.weight"
    with pytest.raises(ValueError, match="its tensors may be those of text or of vision"):
        place([layer], model)
    assert place([layer], model, prefers=lambda module: module == "vision") == ("", "vision.")
    assert place([layer], model, fits=lambda name, own: own.startswith("text")) == ("", "text.")
    assert place([layer, "patches.weight"], model) == ("", "vision.")
