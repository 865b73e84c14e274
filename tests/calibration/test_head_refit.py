import shutil

import pytest
import torch
from conftest import recipe_for
from torch.nn.functional import linear
from transformers import BertForSequenceClassification

import epmq
from epmq.models.heads import Head, load_head, save_head
from epmq.models.multitask import load_any_head
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.quantization.ridge import fit_ridge
from epmq.recipe_file import load_recipe

QUIET = {"progress": False, "evaluate": False}


@pytest.fixture
def native(pool, tmp_path):
    """The pool's recipe with transformers' own task class for the experts."""
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    for seed, expert in enumerate(recipe["experts"]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(expert["model"], num_labels=3)
        expert["model"] = str(tmp_path / expert["name"])
        model.save_pretrained(expert["model"])
    return recipe


def pooled(head, backbone, batches):
    return torch.cat([head.features(backbone(**b).last_hidden_state, b["attention_mask"]) for b in batches])


@pytest.mark.parametrize("form", ["file", "native"])
@torch.no_grad()
def test_heads_give_the_experts_scores_on_the_new_features(pool, native, tmp_path, form):
    """What a run writes is what one gets from the finished checkpoint and the experts as they are."""
    recipe = native if form == "native" else recipe_for(pool, output=str(tmp_path / "out"))
    report = run(recipe, **QUIET)
    prepared, model = prepare(load_recipe({**recipe, "output": None})), epmq.load(tmp_path / "out")
    for expert in prepared.recipe.experts:
        task, batches = expert.name, prepared.calibration[expert.name]
        whole = prepared.experts.whole_model(prepared.experts.experts[task], torch.device("cpu"))
        if form == "native":
            own = BertForSequenceClassification.from_pretrained(expert.model).eval()
            scores = torch.cat([own(**batch).logits for batch in batches])
            rows = torch.cat([model.backbone(**batch).pooler_output for batch in batches])
            weight, bias = own.classifier.weight, own.classifier.bias
            written = model.head(task).model.classifier
        else:
            head = load_head(pool / "experts" / task / "head.safetensors")

            scores = linear(pooled(head, whole, batches), head.weight, head.bias)
            rows, weight, bias = pooled(head, model.backbone, batches), head.weight, head.bias
            written = model.head(task)
        fit = fit_ridge(rows, scores, weight, bias)
        torch.testing.assert_close(written.weight, fit.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(written.bias, fit.bias, rtol=1e-3, atol=1e-4)
        reported = report["heads"][task]
        assert reported["strength"] == fit.ridge and reported["after"] < reported["before"]


def test_heads_can_follow_plain_gptq(pool, tmp_path):
    """The experts are asked for their scores alone: the weights are GPTQ's, bit for bit."""
    for name, settings in (("plain", {}), ("followed", {"adapt_heads": True})):
        quantize = {"method": "gptq", **settings}
        report = run(recipe_for(pool, quantize=quantize, output=str(tmp_path / name)), **QUIET)
    assert set(report["heads"]) == {"one", "two"}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "followed")]
    assert files[0] == files[1]
    heads = [load_head(tmp_path / name / "heads" / "one.safetensors").weight for name in ("plain", "followed")]
    assert not torch.equal(*heads)


def test_heads_stay_where_they_are_asked_to(pool, tmp_path):
    for method in ({"adapt_heads": False}, {"method": "e_pmq"}, {"method": "gptq"}):
        output = tmp_path / method.get("method", "ours")
        report = run(recipe_for(pool, quantize=method, output=str(output)), **QUIET)
        assert report["heads"] == {}
        for task in ("one", "two"):
            old = load_head(pool / "experts" / task / "head.safetensors")
            assert torch.equal(load_head(output / "heads" / f"{task}.safetensors").weight, old.weight)


def test_a_head_file_is_the_same_each_time(tmp_path):
    """safetensors writes several metadata entries in any order."""
    head = Head(torch.randn(2, 4), torch.randn(2), "mean", False, ["a", "b"])
    for i in range(8):
        save_head(head, tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1
    assert load_any_head(tmp_path / "0.safetensors", torch.nn.Identity()).labels == ["a", "b"]


def test_the_anchor_is_strong_only_where_every_head_follows(pool, tmp_path):
    def anchor(recipe):
        settings = prepare(load_recipe(recipe), evaluate=False).recipe.quantize
        return settings.anchor_strength, settings.anchor_scale

    recipe = recipe_for(pool)
    assert anchor(recipe) == (30, 3)
    shutil.copytree(pool / "experts" / "two", tmp_path / "two", ignore=lambda *_: ["head.safetensors"])
    recipe["experts"][1]["model"] = str(tmp_path / "two")
    assert anchor(recipe) == (0.03, 1)
