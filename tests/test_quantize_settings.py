"""Settings of merge methods and quantizers."""

import inspect

import pytest
from made_recipes import smallest
from pydantic import ValidationError

from epmq.merge_settings import Dare, Merge, Ties, settings_classes
from epmq.merging.methods import METHODS
from epmq.quantization.grid import BITS, GROUP_SIZES, Grid
from epmq.quantize_settings import BY_HEADS, ExpertGuided, Guidance, Quantize, quantize_settings
from epmq.recipe_file import load_recipe

# Fields of the guided quantizers, with a value that each may have.
GUIDED = {
    "anchor_strength": 0.5,
    "anchor_scale": 0.5,
    "expert_features": 0.5,
    "expert_stream": True,
    "task_weights": {"one": 1.0},
}


def refusal(method: str, **fields) -> str:
    """What is said of a quantizer's settings in a recipe."""
    with pytest.raises(ValueError) as error:
        load_recipe(smallest(quantize={"method": method, **fields}))
    return str(error.value)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_grid_can_be_asked_for(bits, group_size):
    settings = quantize_settings(bits=bits, group_size=group_size, symmetric=False)
    assert settings.block_grid == Grid(bits, group_size, False)


def test_damping_is_for_methods_that_have_it_apart_from_the_anchor():
    assert quantize_settings(method="gptq").damping == 0.01
    assert quantize_settings(method="gptq", damping=0.2).damping == 0.2
    assert quantize_settings(method="expert_guided", anchor_strength=0.5).damping == 0.03
    for method in ("none", "rtn", "e_pmq"):
        assert quantize_settings(method=method).guidance().damping is None
        assert refusal(method, damping=0.02) == f"recipe: quantize.damping: {method} does not use it"
        with pytest.raises(ValidationError, match="damping"):
            quantize_settings(method=method, damping=0.02)


def test_each_guided_method_has_its_own_defaults():
    paper, ours = quantize_settings(method="e_pmq"), quantize_settings(method="expert_guided")
    assert (paper.guidance().anchor_scale, paper.guidance().features) == (1, 0)
    assert (ours.anchor_strength, ours.expert_stream, ours.adapt_heads) == (None, None, True)
    assert (paper.guidance().stream, paper.guidance().refit_heads) == (False, False)
    assert quantize_settings(method="gptq", adapt_heads=True).adapt_heads
    for field, value in GUIDED.items():
        assert f"quantize.{field}: gptq does not use it" in refusal("gptq", **{field: value})
    for field in ("anchor_scale", "expert_features", "expert_stream"):
        assert f"quantize.{field}: e_pmq does not use it" in refusal("e_pmq", **{field: GUIDED[field]})
    assert "quantize.adapt_heads: e_pmq does not use it" in refusal("e_pmq", adapt_heads=True)


def test_the_anchor_is_resolved_by_whether_there_are_heads_that_follow():
    def resolved(heads, merge="task_arithmetic", **settings):
        return load_recipe(smallest(quantize=settings, merge={"method": merge})).resolved(heads).quantize

    def anchor(heads, merge="task_arithmetic", **settings):
        quantize = resolved(heads, merge, **settings)
        return quantize.anchor_strength, quantize.anchor_scale

    assert anchor(True) == (30, 3) and anchor(False) == (0.03, 1)
    assert anchor(True, "wudi") == (30, 1.8) and anchor(False, "wudi") == (0.03, 1)
    assert anchor(True, adapt_heads=False) == (0.03, 1)
    assert anchor(True, anchor_scale=2) == (30, 2) and anchor(False, anchor_strength=0.5) == (0.5, 1)
    for method in ("e_pmq", "gptq"):
        assert resolved(True, method=method) == quantize_settings(method=method)


def test_what_calibration_does_follows_from_the_settings():
    assert quantize_settings(method="rtn").guidance() == Guidance()
    gptq = quantize_settings(method="gptq", adapt_heads=True).guidance()
    assert gptq == Guidance(refit_heads=True, damping=0.01) and gptq.runs_experts
    paper = quantize_settings(method="e_pmq", anchor_strength=0.2).guidance()
    assert paper == Guidance(experts=True, ridge=0.2) and not paper.runs_experts
    ours = ExpertGuided(**BY_HEADS[True]).guidance()
    assert (ours.ridge, ours.anchor_scale, ours.features, ours.stream, ours.refit_heads) == (30, 3, 0, True, True)


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ({"method": "average"}, {"weights": None}),
        ({"method": "average", "weights": [1, 3]}, {"weights": [1, 3]}),
        ({"method": "task_arithmetic", "scaling": [0.1, 0.2]}, {"scaling": [0.1, 0.2]}),
        ({"method": "ties"}, {"scaling": 1.0, "density": 0.2, "agreed": "mean"}),
        ({"method": "ties", "scaling": 0.0, "agreed": "sum"}, {"scaling": 0.0, "density": 0.2, "agreed": "sum"}),
        ({"method": "dare", "density": 0.9}, {"scaling": 0.3, "density": 0.9, "combine": "task_arithmetic"}),
    ],
)
def test_settings_are_arguments_of_the_merge_method(merge, expected):
    assert load_recipe(smallest(merge=merge)).merge.arguments() == expected


@pytest.mark.parametrize("method", settings_classes(Merge))
def test_every_merge_method_has_functions_that_take_its_settings(method):
    settings, functions = settings_classes(Merge)[method](), METHODS[method]
    _takes(functions.entries, settings.arguments())
    if functions.matrix is not None:
        _takes(functions.matrix, settings.matrix_arguments())


def _takes(function, arguments):
    parameters = inspect.signature(function).parameters
    assert arguments.keys() <= parameters.keys()
    for name, value in arguments.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY and parameters[name].default == value


def test_every_quantizer_has_guidance():
    for method, settings_class in settings_classes(Quantize).items():
        settings = settings_class()
        assert settings.method == method and settings.guidance().experts == settings.guided
        assert settings.calibrates or settings.guidance() == Guidance()
        assert settings_class.__doc__


@pytest.mark.parametrize("settings", [lambda: Ties(scaling=[0.3, 0.3]), lambda: Dare(combine="ties", scaling=[0.3])])
def test_ties_takes_one_scaling(settings):
    with pytest.raises(ValidationError, match="takes one number, not one an expert"):
        settings()


def test_refining_is_off_unless_asked_for_and_yaml_may_say_so():
    for method in ("gptq", "e_pmq", "expert_guided"):
        assert quantize_settings(method=method).refine == quantize_settings(method=method, refine=False).refine == "off"
        assert quantize_settings(method=method, refine="distill").refine_epochs == 5
    assert "quantize.refine: rtn does not use it" in refusal("rtn", refine="distill")
    assert "refine" in refusal("gptq", refine=True) and "refine" in refusal("gptq", refine="on")
    assert "refine_epochs" in refusal("gptq", refine_epochs=0)
    assert "refine_learning_rate" in refusal("gptq", refine_learning_rate=0)
