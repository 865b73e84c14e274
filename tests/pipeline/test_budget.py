"""A limit of size for the whole file."""

from pathlib import Path
from typing import Any

import pytest
from conftest import perturbed, recipe_for
from families import FAMILIES

import epmq
from epmq.errors import InputError
from epmq.pipeline import budget
from epmq.pipeline.cost import dry_run
from epmq.pipeline.journal import Journal
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


def recipe(pool, output: Path, **quantize: Any) -> dict[str, Any]:
    return {**recipe_for(pool, quantize={"method": "gptq", **quantize}), "output": str(output)}


def test_the_file_is_nearly_as_large_as_it_may_be(pool, tmp_path):
    report = epmq.run(recipe(pool, tmp_path / "out", size="30KB"), **QUIET)
    assert 27_000 <= report["bytes"] <= 30_000
    assert len({layer["bits"] for layer in report["layers"]}) > 1


def test_a_model_without_tables_keeps_to_a_limit(tmp_path):
    model, batches = FAMILIES["vit"].build(), FAMILIES["vit"].batches()
    model.save_pretrained(tmp_path / "base")
    perturbed(model, 1).save_pretrained(tmp_path / "expert")
    content = {"base": str(tmp_path / "base"), "experts": [{"name": "one", "model": str(tmp_path / "expert")}]}
    content |= {"quantize": {"method": "expert_guided", "budget": 9.0}, "output": str(tmp_path / "out")}
    report = epmq.run(content, calibration={"one": batches}, **QUIET)
    assert 8.5 < report["bits_per_weight"] <= 9.0 and len({layer["bits"] for layer in report["layers"]}) > 1


def test_bits_that_are_given_stay(pool, tmp_path):
    overrides = [{"layers": "*.query", "bits": 2}]
    content = recipe(pool, tmp_path / "out", budget=9.0, embeddings=8, overrides=overrides)
    layout = prepare(load_recipe(content), evaluate=False).layout
    grids = layout.quantized()
    assert grids["embeddings.word_embeddings"].bits == 8 and "embeddings.word_embeddings" not in layout.free
    queries = [name for name in grids if name.endswith("query")]
    assert {grids[name].bits for name in queries} == {2} and not layout.free.keys() & set(queries)


def test_a_limit_that_cannot_be_kept_is_refused_before_any_compute(pool, tmp_path):
    for limit in ({"budget": 2.0}, {"size": 1000}):
        for start in (epmq.run, dry_run):
            with pytest.raises(InputError, match=r"quantize\.(budget|size): .* is too little: with the smallest grids"):
                start(recipe(pool, tmp_path / "out", **limit), progress=False)
    with pytest.raises(InputError, match=r"quantize\.budget, size: rtn has no data"):
        epmq.run(recipe(pool, tmp_path / "out", budget=4.0, method="rtn"), **QUIET)
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_goes_on_with_the_same_choice(pool, tmp_path, monkeypatch):
    epmq.run(recipe(pool, tmp_path / "whole", budget=9.0), **QUIET)
    append = Journal.append

    def stop(self: Journal, name: str, reports: list[dict[str, Any]]) -> None:
        append(self, name, reports)
        if len(self) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "append", stop)
        epmq.run(recipe(pool, tmp_path / "stopped", budget=9.0), **QUIET)
    monkeypatch.setattr(budget, "choose_grids", lambda *args: pytest.fail("it has been chosen"))
    epmq.run(recipe(pool, tmp_path / "stopped", budget=9.0), **QUIET)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
