"""What transformers alone cannot open is said before anything is computed, and it is so."""

import json

import pytest
from conftest import recipe_for

import epmq
from epmq.models.loading import why_not_direct

SETTINGS = {
    "default": {},
    "packed table": {"embeddings": 4},
    "zero points": {"symmetric": False, "embeddings": 16},
    "zero points on several grids": {"symmetric": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_note_before_and_the_output_agree(pool, tmp_path, name):
    recipe = recipe_for(pool, quantize={"method": "rtn", **SETTINGS[name]}, output=str(tmp_path / "out"))
    notes = epmq.dry_run(recipe, progress=False).notes
    assert not (tmp_path / "out").exists()
    report = epmq.run(recipe, progress=False, evaluate=False)
    fault = why_not_direct(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))
    said = [note for note in report["notes"] if "AutoModel.from_pretrained cannot open" in note]
    assert len(said) == (fault is not None) and all(note in notes and fault in note for note in said)
    assert (fault is not None) == (name in ("packed table", "zero points on several grids"))
