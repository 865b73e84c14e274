"""All methods on one recipe, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_for
from typer.testing import CliRunner

import epmq
from epmq.cli import app
from epmq.errors import InputError
from epmq.files import read_json
from epmq.pipeline import compare
from epmq.pipeline.compare import compare_methods, methods_of
from epmq.recipe_file import load_recipe

NAMES = ["base", "experts", "merged", "RTN", "GPTQ", "GPTQ with heads", "expert-guided"]


@pytest.fixture(scope="module")
def compared(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe, and the folder of its comparison."""
    recipe = recipe_for(pool, quantize={"bits": 3, "group_size": 32}, samples=8, formats=["gptq"])
    folder = tmp_path_factory.mktemp("compared") / "out"
    content = compare_methods(recipe, folder, progress=False)
    assert read_json(folder / "compare.json") == content
    return recipe, folder


def test_every_method_is_a_run_of_the_recipe(compared: tuple[dict[str, Any], Path]) -> None:
    recipe, folder = compared
    content = read_json(folder / "compare.json")
    columns = content["columns"]
    assert list(columns) == NAMES and content["notes"] == []
    assert content["settings"] == "3 bits, g32 where quantized, task_arithmetic"
    assert columns["experts"]["scores"] == epmq.evaluate_experts(recipe, progress=False)["scores"]
    assert columns["base"]["scores"] == epmq.evaluate_experts(recipe, base=True, progress=False)["scores"]
    assert columns["experts"]["bytes"] == 2 * columns["base"]["bytes"] == 2 * columns["merged"]["bytes"]
    for name in NAMES[2:]:
        report = read_json(folder / name.lower().replace(" ", "-") / "report.json")
        assert (report["scores"], report["bytes"]) == (columns[name]["scores"], columns[name]["bytes"])
        assert report["exports"] == []
    assert columns["RTN"]["bytes"] == columns["GPTQ"]["bytes"] == columns["expert-guided"]["bytes"]
    heads = {name: bool(read_json(folder / name / "report.json")["heads"]) for name in ("gptq", "gptq-with-heads")}
    assert heads == {"gptq": False, "gptq-with-heads": True}
    page = (folder / "report.html").read_text()
    assert all(name in page for name in NAMES[2:]) and "The experts, each on its own task" in page


def test_the_same_recipe_keeps_what_is_finished(
    compared: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = compared
    before = read_json(folder / "compare.json")
    for name in ("run", "evaluate_experts"):
        monkeypatch.setattr(compare, name, lambda *_, **__: pytest.fail("it is done again"))
    assert compare_methods({**recipe, "output": "elsewhere"}, folder, progress=False) == before
    with pytest.raises(ValueError, match=r"another recipe \(quantize\.bits: 3 → 4\): choose another"):
        compare_methods({**recipe, "quantize": {"bits": 4, "group_size": 32}}, folder, progress=False)


def test_the_command_shows_one_table(compared: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    recipe, folder = compared
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "my.yaml"), "-o", str(folder), "-q"])
    assert result.exit_code == 0 and "accuracy in %, 3 bits" in result.output and "report.html" in result.output


def test_what_is_missing_is_said_before_any_compute(pool: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = recipe_for(pool)
    for field, message in (("evaluation", "no expert has evaluation data"), ("calibration", "gptq, which is compared")):
        experts = [{name: value for name, value in one.items() if name != field} for one in recipe["experts"]]
        with pytest.raises(ValueError, match=message):
            compare_methods({**recipe, "experts": experts}, output, progress=False)
    with pytest.raises(ValueError, match="16 rounds nothing"):
        compare_methods({**recipe, "quantize": {"bits": 16}}, output, progress=False)
    assert not output.exists()
    output.mkdir()
    with pytest.raises(FileExistsError, match="not from an earlier comparison"):
        compare_methods(recipe, output, progress=False)


def test_methods_share_how_things_are_stored_and_the_recipes_own_comes_last(pool: Path) -> None:
    own = {"bits": 2, "embeddings": 4, "damping": 0.5, "scales": "minmax", "drop_unused": True}
    methods, notes = methods_of(load_recipe(recipe_for(pool, quantize=own)), heads=True)
    assert list(methods) == NAMES[2:] and notes == []
    stored = {(one.bits, one.embeddings.bits, one.scales) for one in list(methods.values())[1:]}
    assert stored == {(2, 4, "minmax")}
    assert methods["GPTQ"].damping == 0.01 and not methods["RTN"].drop_unused and methods["GPTQ"].drop_unused
    gptq = {"method": "gptq", "damping": 0.5}
    methods, _ = methods_of(load_recipe(recipe_for(pool, quantize=gptq)), heads=False)
    assert list(methods) == ["merged", "RTN", "GPTQ"] and methods["GPTQ"].damping == 0.5
    refined = load_recipe(recipe_for(pool, quantize={**gptq, "refine": "distill"}))
    methods, _ = methods_of(refined, heads=False)
    assert list(methods)[-2:] == ["GPTQ", "GPTQ refined"] and methods["GPTQ refined"] == refined.quantize
    assert methods["GPTQ"].refine == "off" and methods["GPTQ"].damping == refined.quantize.damping
    methods, notes = methods_of(load_recipe(recipe_for(pool, quantize={"budget": 4.0})), heads=False)
    assert list(methods) == ["merged", "GPTQ", "expert-guided"] and "RTN is left out" in notes[0]


def test_a_base_that_cannot_be_scored_is_left_out_with_a_note(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare.evaluate_experts

    def evaluate(recipe: Any, *, base: bool, progress: bool) -> dict[str, Any]:
        if base:
            raise InputError("no such head")
        return whole(recipe, base=base, progress=progress)

    monkeypatch.setattr(compare, "evaluate_experts", evaluate)
    monkeypatch.setattr(compare, "methods_of", lambda recipe, heads: ({"GPTQ": recipe.quantize}, []))
    content = compare_methods(recipe_for(pool, quantize={"method": "rtn"}), tmp_path / "out", progress=False)
    assert list(content["columns"]) == ["experts", "GPTQ"] and "no such head" in content["notes"][0]
