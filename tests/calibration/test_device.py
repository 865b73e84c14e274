"""The same runs on an accelerator: a pretended one, which stops what would stop there, and a real one if there is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_weights
from conftest import TEXTS, perturbed, recipe_for, word_tokenizer
from families import FAMILIES
from transformers import BertForSequenceClassification

import epmq
from epmq.pipeline.evaluation import evaluate_checkpoint, evaluate_experts
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe
from tests.kit.accelerator import pretended_accelerator

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["pretended", pytest.param("cuda", marks=GPU)]


def cases(*quick: str, more: tuple[str, ...]) -> list[Any]:
    """Pairs of a device and something that is tried there, `more` on a real one only."""
    tried = [("pretended", name) for name in quick]
    return [*tried, *(pytest.param("cuda", name, marks=GPU) for name in (*quick, *more))]


@pytest.fixture(params=DEVICES)
def accelerator(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a device that is not the processor."""
    if request.param != "pretended":
        yield request.param
        return
    with pretended_accelerator() as name:
        yield name


def both(recipe: dict[str, Any], folder: Path, device: str, **settings: Any) -> list[dict[str, Any]]:
    """Reports of the same run on the processor and on a device; the outputs are `cpu` and `device` in a folder."""
    outputs = {"cpu": "cpu", "device": device}
    return [
        epmq.run({**recipe, "device": name, "output": str(folder / out)}, progress=False, **settings)
        for out, name in outputs.items()
    ]


def weight_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("accelerator", "method"), cases("expert_guided", more=("gptq", "e_pmq")), indirect=["accelerator"]
)
def test_a_run_gives_what_a_run_on_the_processor_gives(pool, tmp_path, accelerator, method):
    heads = {} if method == "e_pmq" else {"adapt_heads": True}
    recipe = recipe_for(pool, quantize={"method": method, **heads})
    ours, theirs = both(recipe, tmp_path, accelerator)
    batch = prepare(load_recipe(recipe)).calibration["one"][0]
    with torch.no_grad():
        one, other = (epmq.load(tmp_path / name).backbone(**batch).last_hidden_state for name in ("cpu", "device"))
    # Codes that lie half way between two levels may fall to either side.
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)
    assert (one - other).norm() < 0.2 * one.norm()
    assert theirs["heads"].keys() == ours["heads"].keys() and bool(theirs["heads"]) == bool(heads)
    assert theirs["scores"].keys() == {"one", "two"}


# Each brings something of its own that must be on the device: buffers, masks, position biases, two stacks, images.
@pytest.mark.parametrize(
    ("accelerator", "kind"),
    cases("clip", more=("gpt2", "llama", "gemma3", "qwen2", "t5", "flan_t5", "bart", "dinov2", "vit", "roberta")),
    indirect=["accelerator"],
)
def test_every_part_of_a_model_is_on_the_device(tmp_path, accelerator, kind):
    family, calibration = FAMILIES[kind], {}
    family.build().save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("one", "two"), start=1):
        perturbed(type(family.build()).from_pretrained(tmp_path / "base"), seed).save_pretrained(tmp_path / task)
        calibration[task] = family.batches()
    experts = [{"name": task, "model": str(tmp_path / task)} for task in calibration]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "format": "dequantized"}
    ours, theirs = both(recipe, tmp_path, accelerator, calibration=calibration)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)


def test_native_heads_and_what_the_base_lacks(own_pool, tmp_path, accelerator):
    """The pooler is absent from the base: zeros that a run makes itself, and each head brings its own."""
    edit_weights(own_pool / "base", pooler__dense__weight=None, pooler__dense__bias=None)
    recipe = recipe_for(own_pool)
    for seed, expert in enumerate(recipe["experts"], start=1):
        model = BertForSequenceClassification.from_pretrained(own_pool / "base", num_labels=3)
        expert["model"] = str(tmp_path / expert["name"])
        perturbed(model, seed).save_pretrained(expert["model"])
    ours, theirs = both(recipe, tmp_path, accelerator)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)
    assert theirs["heads"].keys() == {"one", "two"} and theirs["scores"].keys() == {"one", "two"}


@pytest.mark.parametrize(("accelerator", "quantize"), cases(more=("none", "rtn")), indirect=["accelerator"])
def test_merging_and_rounding_give_the_same_bytes(pool, tmp_path, accelerator, quantize):
    both(recipe_for(pool, quantize={"method": quantize}), tmp_path, accelerator, evaluate=False)
    assert weight_bytes(tmp_path / "cpu") == weight_bytes(tmp_path / "device")


@pytest.mark.parametrize("accelerator", DEVICES[1:], indirect=True)
def test_the_same_run_gives_the_same_bytes(pool, tmp_path, accelerator):
    for name in ("again", "once"):
        recipe = recipe_for(pool, device=accelerator, output=str(tmp_path / name))
        epmq.run(recipe, progress=False, evaluate=False)
    assert weight_bytes(tmp_path / "again") == weight_bytes(tmp_path / "once")


def test_loading_answering_and_scoring(pool, tmp_path, accelerator):
    recipe = recipe_for(pool, quantize={"method": "rtn", "bits": 8}, output=str(tmp_path / "out"))
    epmq.run(recipe, progress=False, evaluate=False)
    model = epmq.load(tmp_path / "out", device=accelerator)
    assert model.device.type == accelerator
    assert model.answer("one", TEXTS) == epmq.load(tmp_path / "out").answer("one", TEXTS)
    there = {**recipe, "device": accelerator}
    assert evaluate_checkpoint(tmp_path / "out", there, progress=False)["scores"].keys() == {"one", "two"}
    assert evaluate_experts(there, progress=False) == evaluate_experts({**recipe, "device": "cpu"}, progress=False)


@pytest.mark.parametrize(("accelerator", "kind"), cases(more=("llama", "flan_t5")), indirect=["accelerator"])
def test_what_writes_is_scored_there(tmp_path, accelerator, kind):
    model = FAMILIES[kind].build()
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    perturbed(model, 1).save_pretrained(tmp_path / "one")
    rows = [{"text": text} if kind == "llama" else {"text": text, "target": "a dog"} for text in TEXTS * 4]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "data.jsonl")}
    expert = {"name": "one", "model": str(tmp_path / "one"), "calibration": data, "evaluation": data}
    recipe = {"base": str(tmp_path / "base"), "experts": [expert], "batch_size": 4, "max_length": 8}
    ours, theirs = both(recipe, tmp_path, accelerator)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)
    assert theirs["scores"]["one"] == pytest.approx(ours["scores"]["one"], rel=0.05)
    if kind == "llama":
        assert len(epmq.load(tmp_path / "device", device=accelerator).generate(TEXTS[:1], max_new_tokens=1)) == 1


@pytest.mark.parametrize("accelerator", DEVICES[1:], indirect=True)
def test_a_dry_run_measures_the_device(pool, accelerator):
    plan = epmq.dry_run(recipe_for(pool, device=accelerator), progress=False)
    assert plan.layers == 12 and plan.seconds["solve"] > 0
