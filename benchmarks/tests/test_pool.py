"""Recipes over a pool."""

import pytest

from benchmarks.suites.pool import pool_recipe


@pytest.fixture
def root(tmp_path):
    for task in ("one", "two"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").touch()
    return tmp_path


def test_a_pool_is_calibrated_on_training_data_and_scored_on_a_split(root):
    recipe = pool_recipe(root, ["two", "one"], max_length=9, split="validation", test_samples=5, quantize={"bits": 3})
    assert recipe.base == str(root / "base") and recipe.max_length == 9 and recipe.quantize.bits == 3
    assert [expert.name for expert in recipe.experts] == ["two", "one"]
    two = recipe.experts[0]
    assert two.model == str(root / "experts" / "two")
    assert two.calibration.path == str(root / "data" / "two" / "train.jsonl") and two.calibration.samples is None
    assert two.evaluation.path == str(root / "data" / "two" / "validation.jsonl") and two.evaluation.samples == 5
    unpacked = pool_recipe(root, ["one"], max_length=None, data={"pack": False}).experts[0]
    assert not unpacked.calibration.pack and not unpacked.evaluation.pack
