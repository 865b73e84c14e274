import copy
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from epmq.files import parse_yaml
from epmq.merging.methods import METHODS
from epmq.quantization.grid import BITS, GROUP_SIZES, Grid
from epmq.recipe import GUIDED, Merge, Quantize, Recipe
from epmq.recipe import METHODS as QUANTIZERS
from epmq.recipe_file import load_recipe


def smallest(**fields):
    """The smallest recipe there is, with top-level fields on top."""
    experts = [{"name": name, "model": name, "calibration": {"path": f"{name}.jsonl"}} for name in ("one", "two")]
    return {"base": "base", "experts": experts, **fields}


def changed(path: str, value) -> dict:
    """The smallest recipe with one field, such as `experts.0.name`, set."""
    recipe = copy.deepcopy(smallest(merge={}, quantize={}))
    *parents, leaf = path.split(".")
    place = recipe
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    place[leaf] = value
    return recipe


def test_defaults():
    recipe = load_recipe(smallest())
    assert recipe.quantize.grid == Grid(4, -1, True) and recipe.format == "pack-quantized"
    assert recipe.merge.settings() == {"scaling": 0.3} and recipe.quantize.method == "expert_guided"
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
        ("merge.method", "slerp", "merge.method: "),
        ("merge.scaling", [0.3], "merge.scaling: 1 values for 2 experts"),
        ("merge.scaling", "much", "merge.scaling"),
        ("merge", {"method": "average", "weights": [1, 1, 1]}, "merge.weights: 3 values for 2 experts"),
        ("merge", {"method": "average", "scaling": 0.3}, "merge: scaling: average does not use it"),
        ("merge", {"method": "ties", "scaling": [0.3, 0.3]}, "merge: scaling: ties takes one number"),
        ("merge.weights", [1, 1], "merge: weights: task_arithmetic does not use it"),
        ("merge.density", 0.5, "merge: density: task_arithmetic does not use it"),
        ("merge", {"method": "ties", "density": 0}, "merge.density: "),
        ("merge", {"method": "dare", "density": 1.5}, "merge.density: "),
        ("merge", {"method": "ties", "trim": "layer"}, "merge.trim: "),
        ("merge", {"method": "dare", "combine": "average"}, "merge.combine: "),
        ("quantize.bits", 5, "quantize.bits: 5 is not one of 2, 3, 4, 8"),
        ("quantize.bits", 16, "quantize.bits: 16 is not one of"),
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
            "quantize.task_weights: gptq does not use them",
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
    *parents, leaf = field.split(".")
    place = recipe
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    del place[leaf]
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
        method: load_recipe({**recipe, "quantize": {"method": method}}).quantize.calibrates for method in QUANTIZERS
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_grid_can_be_asked_for(bits, group_size):
    assert Quantize(bits=bits, group_size=group_size, symmetric=False).grid == Grid(bits, group_size, False)


def test_damping_is_for_methods_that_have_it_apart_from_the_anchor():
    assert Quantize(method="gptq").damping == 0.01 and Quantize(method="gptq", damping=0.2).damping == 0.2
    assert Quantize(method="expert_guided", anchor_strength=0.5).damping == 0.03
    for method in ("none", "rtn", "e_pmq"):
        assert Quantize(method=method).damping is None
        with pytest.raises(ValidationError, match=f"damping: {method} does not use it"):
            Quantize(method=method, damping=0.02)


def test_each_guided_method_has_its_own_defaults():
    paper, ours = Quantize(method="e_pmq"), Quantize(method="expert_guided")
    assert (paper.anchor_scale, paper.expert_features) == (1, 0)
    assert (ours.anchor_strength, ours.expert_stream, ours.adapt_heads) == (None, None, True)
    assert (paper.expert_stream, paper.adapt_heads) == (False, False)
    assert Quantize(method="gptq", adapt_heads=True).adapt_heads
    for field in set(GUIDED["e_pmq"]) - {"adapt_heads"}:
        with pytest.raises(ValidationError, match=f"{field}: gptq does not use it"):
            Quantize(method="gptq", **{field: type(GUIDED["e_pmq"][field])(0.5)})
    for field in ("anchor_scale", "expert_features", "expert_stream", "adapt_heads"):
        with pytest.raises(ValidationError, match=f"{field}: e_pmq, the paper's form, has none"):
            Quantize(method="e_pmq", **{field: type(GUIDED["e_pmq"][field])(0.5)})


def test_the_anchor_is_settled_by_whether_there_are_heads_that_follow():
    def anchor(heads, **settings):
        resolved = Quantize(**settings).resolved(heads)
        return resolved.anchor_strength, resolved.anchor_scale

    assert anchor(True) == (30, 3) and anchor(False) == (0.03, 1)
    assert anchor(True, adapt_heads=False) == (0.03, 1)
    assert anchor(True, anchor_scale=2) == (30, 2) and anchor(False, anchor_strength=0.5) == (0.5, 1)
    for method in ("e_pmq", "gptq"):
        assert Quantize(method=method).resolved(True) == Quantize(method=method)


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ({"method": "average"}, {"weights": None}),
        ({"method": "average", "weights": [1, 3]}, {"weights": [1, 3]}),
        ({"scaling": [0.1, 0.2]}, {"scaling": [0.1, 0.2]}),
        ({"method": "ties"}, {"scaling": 1.0, "density": 0.2, "agreed": "mean"}),
        ({"method": "ties", "scaling": 0.0, "agreed": "sum"}, {"scaling": 0.0, "density": 0.2, "agreed": "sum"}),
        ({"method": "dare", "density": 0.9}, {"scaling": 0.3, "density": 0.9, "combine": "task_arithmetic"}),
    ],
)
def test_settings_are_arguments_of_the_merge_method(merge, expected):
    settings = Merge(**merge).settings()
    assert settings == expected
    assert settings.keys() <= METHODS[Merge(**merge).method].__kwdefaults__.keys()


@pytest.mark.parametrize("text", ["base: [", "a: b: c", "\t- x", "base: !!python/object:os.system {}"])
def test_bad_yaml_names_the_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_a_recipe_is_a_mapping(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: a recipe is a mapping"):
        load_recipe(str(path))


def test_no_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such recipe file"):
            load_recipe(path)


def test_errors_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed("quantize.bits", 5)))
    with pytest.raises(ValueError, match=r"recipe\.yaml: quantize\.bits: 5 is not one of"):
        load_recipe(path)


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    """What lies beside the recipe is found from anywhere; Hub ids, absolute paths and the output stay as they are."""
    for folder in ("recipes/base", "recipes/experts/one", "data"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("recipes/one.jsonl", "recipes/head.safetensors", "data/two.jsonl"):
        (tmp_path / file).write_text("")
    recipe = smallest(output="out")
    one, two = recipe["experts"]
    one |= {"model": "experts/one", "head": "head.safetensors", "evaluation": {"path": "../data/two.jsonl"}}
    two |= {"model": "owner/name", "evaluation": {"path": str(tmp_path / "data" / "two.jsonl")}}
    (tmp_path / "recipes" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path / "data")
    found = load_recipe(Path("../recipes/recipe.yaml"))

    def same(path: str, expected: str) -> bool:
        return Path(path).resolve() == (tmp_path / expected).resolve()

    first, second = found.experts
    assert same(found.base, "recipes/base") and same(first.model, "recipes/experts/one")
    assert same(first.head, "recipes/head.safetensors") and same(first.calibration.path, "recipes/one.jsonl")
    assert same(first.evaluation.path, "data/two.jsonl") and same(second.evaluation.path, "data/two.jsonl")
    assert second.model == "owner/name" and second.calibration.path == "two.jsonl" and found.output == "out"
    assert second.head is None


def test_every_field_is_documented():
    schema = Recipe.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    plain = {"experts", "merge", "quantize", "method"}
    for model in models:
        assert model["description"]
        for name, field in model["properties"].items():
            assert name in plain or field.get("description"), name


TEN = ", ".join(["*a{0}"] * 10)
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{TEN.format(i - 1)}]\n" for i in range(1, 12))
MERGES = "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        "base: &a [*a]\n",
        "base: &a {b: *a}\n",
        "[" * 100_000,
        "- " * 100_000,
        "base: !!timestamp x\n",
        "base: !!binary é\n",
        "base: 2001-99-99\n",
        "? {a: b}\n: 1\n",
        "base: \0\n",
        "base: !!python/object/apply:os.system ['touch sprung']\n",
        "base: !!python/name:os.system ''\n",
    ],
)
def test_a_recipe_that_is_a_bomb_or_a_program_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")
    assert not (tmp_path / "sprung").exists()


def test_aliases_may_be_used(tmp_path):
    text = "base: b\nexperts:\n- {name: x, model: m, calibration: &c {path: d.jsonl}, evaluation: *c}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (expert,) = load_recipe(tmp_path / "recipe.yaml").experts
    assert expert.calibration == expert.evaluation


@given(text=st.text(max_size=100) | st.text(alphabet="&*a:-{}[]!<? \n\"'0", max_size=100))
def test_yaml_is_a_value_or_an_error(text):
    with suppress(ValueError):
        parse_yaml(text)
