from pathlib import Path
from typing import Any

import pytest
from conftest import padded_batches, perturbed, recipe_for
from families import FAMILIES

from epmq import dry_run

DISTILL = {"method": "gptq", "refine": "distill"}


def test_more_epochs_take_longer(pool):
    plans = [
        dry_run(recipe_for(pool, quantize={**DISTILL, "refine_epochs": epochs}), progress=False) for epochs in (1, 100)
    ]
    assert 0 < plans[0].seconds["refine"] < plans[1].seconds["refine"]
    plain = dry_run(recipe_for(pool, quantize={"method": "gptq"}), progress=False)
    assert plain.seconds.keys() == plans[0].seconds.keys() - {"refine"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_language_models_are_measured(tmp_path: Path, name: str):
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path / "base")
    experts: list[dict[str, Any]] = []
    for seed, task in enumerate(("one", "two"), start=1):
        perturbed(type(model).from_pretrained(tmp_path / "base"), seed).save_pretrained(tmp_path / task)
        experts.append({"name": task, "model": str(tmp_path / task)})
    texts = padded_batches(3)
    if name == "t5":
        texts = [{**one, "decoder_input_ids": one["input_ids"]} for one in texts]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "quantize": {**DISTILL, "group_size": 32}}
    plan = dry_run(recipe, calibration={"one": texts, "two": texts}, progress=False)
    assert plan.seconds["refine"] > 0 and plan.peak_memory_mb > 0
