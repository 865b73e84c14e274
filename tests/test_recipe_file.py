"""Recipes as YAML files."""

from pathlib import Path

import pytest
import yaml
from made_recipes import changed, smallest

from epmq.recipe_file import load_recipe

TEN = ", ".join(["*a{0}"] * 10)
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{TEN.format(i - 1)}]\n" for i in range(1, 12))
MERGES = "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


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
