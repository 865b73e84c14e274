import shutil

import pytest
import torch
from conftest import recipe_for
from torch.nn.functional import linear
from transformers import BertForSequenceClassification, BertForTokenClassification

import epmq
from epmq.calibration.head_refit import CannotFollow, scored_rows
from epmq.models.heads import Head, load_head, save_head
from epmq.models.multitask import NativeHead, load_any_head
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


class Scorer(torch.nn.Module):
    """A head on the inputs themselves: what its layer gives, changed."""

    def __init__(self, change, calls=1):
        super().__init__()
        self.scoring, self._change, self._calls = torch.nn.Linear(4, 3), change, calls

    def forward(self, hidden, **inputs):
        for _ in range(self._calls):
            scores = self.scoring(hidden)
        return self._change(scores)


@torch.no_grad()
@pytest.mark.parametrize(
    "change, why",
    [
        (lambda scores: scores.softmax(-1), "its scores are not what its last linear layer gives"),
        (lambda scores: 2 * scores, "its scores are not what its last linear layer gives"),
        (lambda scores: scores.mean(1), "its scores are not what its last linear layer gives"),
        (None, "its last linear layer is called 2 times"),
    ],
)
def test_heads_whose_scores_are_no_linear_map_stay_and_the_reason_is_true(change, why):
    hidden = torch.randn(2, 5, 4)
    head = Scorer(change) if change else Scorer(lambda scores: scores, calls=2)
    with pytest.raises(CannotFollow, match=why):
        scored_rows(torch.nn.Identity(), head, {"hidden": hidden})
    head.scoring = None
    with pytest.raises(CannotFollow, match="no linear layer of its own"):
        scored_rows(torch.nn.Identity(), head, {"hidden": hidden})


@torch.no_grad()
def test_rows_are_those_of_real_tokens_or_of_the_one_that_is_scored():
    hidden, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    rows = scored_rows(torch.nn.Identity(), Scorer(lambda scores: scores), {"hidden": hidden, "attention_mask": mask})
    assert torch.equal(rows.features, hidden[mask.bool()])
    scores = torch.randn(2, 5, 3)
    assert torch.equal(rows.of(scores), scores[mask.bool()])

    last = torch.tensor([2, 4])
    head = Scorer(lambda scores: scores[torch.arange(2), last])
    rows = scored_rows(torch.nn.Identity(), head, {"hidden": hidden, "attention_mask": mask})
    assert torch.equal(rows.features, hidden[torch.arange(2), last])
    assert torch.equal(rows.of(scores[:, 0]), scores[:, 0])

    choices = scored_rows(torch.nn.Identity(), Scorer(lambda scores: scores.view(1, -1)), {"hidden": hidden[:, 0]})
    assert torch.equal(choices.features, hidden[:, 0])
    with pytest.raises(CannotFollow, match="several tokens"):
        hidden[1, 2] = hidden[1, 4] + torch.tensor([1.0, 0, 0, 0])
        head.scoring.weight[:, 0] = 0
        scored_rows(torch.nn.Identity(), head, {"hidden": hidden})


@torch.no_grad()
def test_token_classifiers_follow_on_all_real_tokens(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    for seed, expert in enumerate(recipe["experts"]):
        torch.manual_seed(seed)
        model = BertForTokenClassification.from_pretrained(expert["model"], num_labels=3)
        expert["model"] = str(tmp_path / expert["name"])
        model.save_pretrained(expert["model"])
    report = run(recipe, **QUIET)
    prepared, model = prepare(load_recipe({**recipe, "output": None}), evaluate=False), epmq.load(tmp_path / "out")
    assert prepared.recipe.quantize.anchor_scale == 3
    for expert in prepared.recipe.experts:
        own, errors = BertForTokenClassification.from_pretrained(expert.model).eval(), []
        for batch in prepared.calibration[expert.name]:
            real = batch["attention_mask"].bool()
            errors.append((model(expert.name, **batch) - own(**batch).logits)[real].square())
        reported = report["heads"][expert.name]
        assert float(torch.cat(errors).mean()) < reported["after"] < reported["before"]


def test_heads_that_cannot_follow_are_known_before_any_compute(native, monkeypatch):
    forward = NativeHead.forward
    monkeypatch.setattr(NativeHead, "forward", lambda self, **inputs: forward(self, **inputs).softmax(-1))
    prepared = prepare(load_recipe({**native, "output": None}), evaluate=False)
    why = "its scores are not what its last linear layer gives"
    assert [f"the head of {task} stays as it is: {why}" for task in ("one", "two")] == prepared.experts.notes.departures
    assert prepared.recipe.quantize.anchor_scale == 1


def test_a_head_that_cannot_be_run_stays(native, tmp_path, monkeypatch):
    monkeypatch.setattr(NativeHead, "forward", lambda self, **inputs: inputs["no such input"])
    report = run(native, **QUIET)
    assert report["heads"] == {}
    assert "the head of one stays as it is: it cannot be run ('no such input')" in report["notes"]
