"""Checkpoints as they are found: other dtypes, layouts and classes than the base's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import weights
from conftest import padded_batches, perturbed, tiny_bert
from families import FAMILIES, clip, clip_config
from merges import AVERAGE, QUIET, batches, open_folder, recipe_of, set_weights
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPVisionModel,
    T5ForConditionalGeneration,
)

import epmq
from epmq.merging.experts import ExpertSet
from epmq.pipeline.run import merge, run
from tests.kit.quantized import PLAIN_OUTSIDE


def whole_model(opened: ExpertSet, task: str | None) -> Any:
    """An expert as a model; the base without a task."""
    return opened.whole_model(opened.base if task is None else opened.experts[task], torch.device("cpu"))


def test_a_base_in_bfloat16_is_packed_with_scales_in_bfloat16_and_read_back_bit_for_bit(tmp_path):
    base = tiny_bert().bfloat16()
    base.save_pretrained(tmp_path / "base")
    perturbed(copy.deepcopy(base).float(), 1).save_pretrained(tmp_path / "one")
    perturbed(copy.deepcopy(base).float(), 2).half().save_pretrained(tmp_path / "two")
    run(recipe_of(tmp_path), calibration=batches(), **QUIET)
    plain = {"format": "dequantized", "output": str(tmp_path / "plain")}
    run(recipe_of(tmp_path) | plain, calibration=batches(), **QUIET)
    packed, dense = weights(tmp_path / "out"), weights(tmp_path / "plain")
    kinds = {tensor.dtype for name, tensor in packed.items() if name.endswith("weight_scale")}
    assert kinds == {torch.bfloat16}
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}
    for dtype in (None, torch.bfloat16):
        states = [epmq.load(tmp_path / name, dtype=dtype).backbone.state_dict() for name in ("out", "plain")]
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert {t.dtype for t in states[0].values() if t.is_floating_point()} == {dtype or torch.float32}
    with torch.no_grad():
        for batch in padded_batches(2):
            models = [epmq.load(tmp_path / name).backbone for name in ("out", "plain")]
            a, b = (model(**batch).last_hidden_state for model in models)
            assert torch.equal(a, b) and torch.isfinite(a).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["expert_guided", "gptq", "rtn"])
def test_a_layer_of_zeros_stays_zero(berts, method, symmetric):
    layer = "encoder.layer.0.intermediate.dense"
    zeros = {f"{layer}.weight".replace(".", "__"): torch.zeros(128, 64)}
    zeros |= {f"{layer}.bias".replace(".", "__"): torch.zeros(128)}
    for name in ("base", "one", "two"):
        set_weights(berts / name, **zeros)
    settings = {"method": method, "symmetric": symmetric}
    run(recipe_of(berts, quantize=settings), calibration=batches(), **QUIET)
    state = epmq.load(berts / "out").backbone.state_dict()
    assert not state[f"{layer}.weight"].any() and not state[f"{layer}.bias"].any()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_shards_are_the_same_as_one_file(berts):
    merge(recipe_of(berts, **AVERAGE), progress=False)
    for name in ("base", "two"):
        model = BertModel.from_pretrained(berts / name)
        (berts / name / "model.safetensors").unlink()
        model.save_pretrained(berts / name, max_shard_size="60KB")
        assert len(list((berts / name).glob("model-*.safetensors"))) > 2
    merge(recipe_of(berts, **AVERAGE, output=str(berts / "again")), progress=False)
    again, expected = weights(berts / "again"), weights(berts / "out")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_names_of_old_are_understood(berts):
    """LayerNorm.gamma and beta, as in the first BERT files, and the prefix of a task class."""
    merge(recipe_of(berts, **AVERAGE), progress=False)
    expected = weights(berts / "out")
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights(berts / "two").items()
    }
    save_file(old, berts / "two" / "model.safetensors", metadata={"format": "pt"})
    merge(recipe_of(berts, **AVERAGE, output=str(berts / "again")), progress=False)
    found = weights(berts / "again")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["lm_head.weight", "decoder.embed_tokens.weight"]])
@pytest.mark.parametrize("which", ["base", "one"])
def test_a_shared_tensor_may_be_stored_under_any_of_its_names(t5s, which, names):
    expected = whole_model(open_folder(t5s, "one"), "one").state_dict()
    shared = weights(t5s / which)["shared.weight"]
    set_weights(t5s / which, shared__weight=None, **{name.replace(".", "__"): shared.clone() for name in names})
    opened = open_folder(t5s, "one")
    state = whole_model(opened, "one").state_dict()
    assert not opened.notes and all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    merge(recipe_of(t5s, "one", **AVERAGE), progress=False)
    written = T5ForConditionalGeneration.from_pretrained(t5s / "out").state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_what_the_base_holds_apart_stays_apart(t5s):
    """As in FLAN-T5: transformers 5 calls every T5 tied, and unties it when it sees an output layer in the file."""
    heads = {which: torch.randn(32, 32) for which in ("base", "one")}
    for which, head in heads.items():
        set_weights(t5s / which, lm_head__weight=head)
    assert torch.equal(whole_model(open_folder(t5s, "one"), "one").lm_head.weight, heads["one"])
    run(recipe_of(t5s, "one", **{**AVERAGE, "quantize": {"method": "rtn", "bits": 8, **PLAIN_OUTSIDE}}), **QUIET)
    written = epmq.load(t5s / "out").backbone
    assert torch.equal(written.lm_head.weight, heads["one"])
    assert torch.equal(written.shared.weight, weights(t5s / "one")["shared.weight"])


def check_answers(folder: Path, experts: dict[str, Any]) -> None:
    """With the merge of nothing but the base, each head answers as it would on the base."""
    for name, expert in experts.items():
        expert.save_pretrained(folder / name)
    run(recipe_of(folder, *experts, merge={"scaling": 0.0}, quantize={"method": "none"}), **QUIET)
    model, batch = epmq.load(folder / "out"), padded_batches(1)[0]
    assert model.tasks == list(experts)
    with torch.no_grad():
        for name, expert in experts.items():
            inner = getattr(expert, expert.base_model_prefix)
            inner.load_state_dict(transformers.AutoModel.from_pretrained(folder / "base").state_dict(), strict=False)
            torch.testing.assert_close(model(name, **batch), expert.eval()(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_classifiers_keep_their_own_heads(tmp_path, family):
    FAMILIES[family].build().save_pretrained(tmp_path / "base")
    experts = {}
    for seed, name in enumerate(("one", "two"), start=2):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=seed)
        experts[name] = perturbed(model, seed)
    check_answers(tmp_path, experts)


def test_a_pooler_that_the_base_lacks_is_each_experts_own(tmp_path):
    """A base saved as a masked language model has no pooler; every classifier brings the one that it trained."""
    config = tiny_bert().config
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    experts = {}
    for seed, name in enumerate(("one", "two"), start=2):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=seed)
        experts[name] = perturbed(model, seed)
    assert not torch.equal(*(model.bert.pooler.dense.weight for model in experts.values()))
    for name, model in experts.items():
        model.save_pretrained(tmp_path / name)
    opened = open_folder(tmp_path)
    assert opened.absent == ["pooler.dense.weight", "pooler.dense.bias"]
    head = [f"cls.predictions.{name}" for name in ("bias", "transform.LayerNorm.bias", "transform.LayerNorm.weight")]
    assert (
        opened.notes
        == opened.notes.departures
        == [
            "not in the base, left out: pooler.dense.weight, pooler.dense.bias",
            f"in the base, left out: {', '.join(head)}, cls.predictions.transform.dense.bias and 1 more",
        ]
    )
    # By hand: every expert's classifier and pooler on the merged encoder.
    merge(recipe_of(tmp_path, merge={"method": "average"}), progress=False)
    model, batch = epmq.load(tmp_path / "out"), padded_batches(1)[0]
    one, two = (experts[name].bert.state_dict() for name in ("one", "two"))
    with torch.no_grad():
        for name, expert in experts.items():
            mixed = {k: (one[k] + two[k]) / 2 if "pooler" not in k else v for k, v in expert.bert.state_dict().items()}
            reference = copy.deepcopy(expert).eval()
            reference.bert.load_state_dict(mixed)
            torch.testing.assert_close(model(name, **batch), reference(**batch).logits, rtol=0, atol=1e-5)
    # Asking one task leaves the other's answers alone.
    first = model("one", **batch)
    model("two", **batch)
    assert torch.equal(model("one", **batch), first)
    assert not any("pooler" in name for name in weights(tmp_path / "out"))


def test_a_quantized_model_of_a_base_without_a_pooler_is_read_back(tmp_path):
    BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), start=2):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=seed)
        perturbed(model, seed).save_pretrained(tmp_path / name)
    run(recipe_of(tmp_path), calibration=batches(), **QUIET)
    run(recipe_of(tmp_path, format="dequantized") | {"output": str(tmp_path / "plain")}, calibration=batches(), **QUIET)
    packed, plain = epmq.load(tmp_path / "out"), epmq.load(tmp_path / "plain")
    for task in packed.tasks:
        assert torch.equal(packed(task, **padded_batches(1)[0]), plain(task, **padded_batches(1)[0]))


def test_token_classifiers_score_every_token(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    experts = {
        name: perturbed(BertForTokenClassification.from_pretrained(tmp_path / "base", num_labels=4), seed)
        for seed, name in enumerate(("one", "two"), start=1)
    }
    check_answers(tmp_path, experts)


def test_vision_experts_of_a_clip_model_make_a_vision_model(tmp_path):
    base = clip()
    base.save_pretrained(tmp_path / "base")
    models = {}
    for seed, name in enumerate(("one", "two"), start=1):
        models[name] = perturbed(CLIPVisionModel.from_pretrained(tmp_path / "base"), seed)
        models[name].save_pretrained(tmp_path / name)
    merge(recipe_of(tmp_path, merge={"method": "average"}), progress=False)
    found = CLIPVisionModel.from_pretrained(tmp_path / "out")
    one, two = (model.state_dict() for model in models.values())
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2 if tensor.is_floating_point() else tensor)
    loaded = epmq.load(tmp_path / "out").backbone
    assert type(loaded) is CLIPVisionModel and loaded.config.hidden_size == clip_config().vision_config.hidden_size
    assert not any("text_model" in name for name in weights(tmp_path / "out"))
    pixels = {"one": FAMILIES["clip_vision"].batches(), "two": FAMILIES["clip_vision"].batches()}
    run(recipe_of(tmp_path) | {"output": str(tmp_path / "packed")}, calibration=pixels, **QUIET)
    quantized = epmq.load(tmp_path / "packed").backbone
    with torch.no_grad():
        output = quantized(**pixels["one"][0]).last_hidden_state
    assert type(quantized) is CLIPVisionModel and torch.isfinite(output).all()


def test_every_expert_is_opened_whole(berts):
    """What calibration runs on is the expert as transformers reads it."""
    opened, batch = open_folder(berts), padded_batches(1)[0]
    for task, folder in ((None, "base"), ("one", "one"), ("two", "two")):
        model = whole_model(opened, task)
        reference = transformers.AutoModel.from_pretrained(berts / folder).eval()
        with torch.no_grad():
            assert torch.equal(model(**batch).pooler_output, reference(**batch).pooler_output)
