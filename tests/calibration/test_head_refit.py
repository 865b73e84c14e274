import shutil

import pytest
import torch
from conftest import recipe_for
from torch.nn.functional import linear
from transformers import BertForSequenceClassification

import epmq
from epmq.calibration import head_refit as answers
from epmq.calibration.head_refit import Fit, fit
from epmq.data.encoding import encode
from epmq.models.heads import Head, load_head, save_head
from epmq.models.multitask import load_any_head
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.recipe_file import load_recipe

QUIET = {"progress": False, "evaluate": False}


def problem(examples=40, features=6, classes=3):
    rows, weight, bias = torch.randn(examples, features), torch.randn(classes, features), torch.randn(classes)
    scores = linear(rows, torch.randn(classes, features), torch.randn(classes)) + 0.1 * torch.randn(examples, classes)
    return rows, scores, weight, bias


def test_a_head_that_fits_is_left_alone():
    rows, _, weight, bias = problem()
    found = fit(rows, linear(rows, weight, bias), weight, bias)
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    assert found.strength == float("inf")


@pytest.mark.parametrize("biased", [True, False])
def test_the_error_is_that_of_leaving_each_example_out(biased, monkeypatch):
    """The closed form against forty fits, each without one example; the ridge pulls towards the head there is."""
    monkeypatch.setattr(answers, "STRENGTHS", (0.1,))
    rows, scores, weight, bias = problem()
    bias = bias if biased else None
    found = fit(rows, scores, weight, bias)
    wide, size = rows.double(), rows.double().square().mean().sqrt()
    if biased:
        wide = torch.cat([wide, size.expand(40, 1)], dim=1)
    left = (scores - linear(rows, weight, bias)).double()
    ridge = 0.1 * 40 * (wide.T @ wide / 40).diagonal().mean() * torch.eye(wide.shape[1])

    def solved(keep):
        return torch.linalg.solve(wide[keep].T @ wide[keep] + ridge, wide[keep].T @ left[keep])

    errors = []
    for i in range(40):
        keep = torch.arange(40) != i
        errors.append((left[i] - wide[i] @ solved(keep)).square().mean())
    assert found.after == pytest.approx(float(torch.stack(errors).mean()), rel=1e-6)
    move = solved(torch.ones(40, dtype=torch.bool)).T.float()
    torch.testing.assert_close(found.weight, weight + move[:, :6])
    if biased:
        torch.testing.assert_close(found.bias, bias + float(size) * move[:, 6])
    else:
        assert found.bias is None


def test_the_best_strength_is_taken(monkeypatch):
    rows, scores, weight, bias = problem()
    each = []
    for strength in answers.STRENGTHS:
        monkeypatch.setattr(answers, "STRENGTHS", (strength,))
        each.append(fit(rows, scores, weight, bias).after)
    monkeypatch.undo()
    found = fit(rows, scores, weight, bias)
    assert found.after == min(each) < found.before


def test_more_features_than_examples_stay_finite():
    rows, scores, weight, bias = problem(examples=4, features=32)
    found = fit(rows, scores, weight, bias)
    assert isinstance(found, Fit) and torch.isfinite(found.weight).all() and found.after <= found.before


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
    job, model = prepare(load_recipe({**recipe, "output": None})), epmq.load(tmp_path / "out")
    for expert in job.recipe.experts:
        task = expert.name
        batches = list(encode(job.calibration[task], job.processor, 8, 16))
        whole = job.sources.whole_model(task, torch.device("cpu"))
        if form == "native":
            own = BertForSequenceClassification.from_pretrained(expert.model).eval()
            scores = torch.cat([own(**batch).logits for batch in batches])
            rows = torch.cat([model.backbone(**batch).pooler_output for batch in batches])
            weight, bias = own.classifier.weight, own.classifier.bias
            found = model.head(task).model.classifier
        else:
            head = load_head(pool / "experts" / task / "head.safetensors")

            scores = linear(pooled(head, whole, batches), head.weight, head.bias)
            rows, weight, bias = pooled(head, model.backbone, batches), head.weight, head.bias
            found = model.head(task)
        wanted = fit(rows, scores, weight, bias)
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.bias, wanted.bias, rtol=1e-3, atol=1e-4)
        said = report["heads"][task]
        assert said["strength"] == wanted.strength and said["after"] < said["before"]


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
