"""Every tensor of base and experts reaches the output, or is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from checkpoints import edit_config, weights
from conftest import padded_batches, perturbed, tiny_bert
from families import FAMILIES, clip
from merges import QUIET, open_folder, recipe_of, set_weights
from safetensors.torch import save_file
from transformers import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification

import epmq
from epmq.merging.accounting import listed
from epmq.pipeline.run import merge

BE_THE_EXPERT = {"merge": {"method": "task_arithmetic", "scaling": 1.0}, "quantize": {"method": "none"}}


@pytest.fixture
def llamas(tmp_path):
    """A base with an output layer of its own, and an expert."""
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "base")
    perturbed(model, 1).save_pretrained(tmp_path / "one")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_proj.lora_A",
        "model.layers.0.self_attn.q_norm.weight",
        "layers.1.mlp.gate.weight",
        "model.layers.7.mlp.up_proj.weight",
        "lm_head.bias",
    ],
)
@pytest.mark.parametrize("which", ["base", "one"])
def test_a_part_that_the_merged_model_lacks_is_an_error(llamas, which, name):
    set_weights(llamas / which, **{name.replace(".", "__"): torch.ones(64)})
    who = "the base" if which == "base" else "expert one"
    with pytest.raises(ValueError, match=rf"^{who}: tensor '{name}' has no counterpart in the base"):
        open_folder(llamas, "one")


@pytest.mark.parametrize("name", ["stray", "v_head.summary.weight", "something.else"])
@pytest.mark.parametrize("which", ["base", "one"])
def test_a_tensor_of_no_class_is_an_error(llamas, which, name):
    set_weights(llamas / which, **{name.replace(".", "__"): torch.ones(3)})
    with pytest.raises(ValueError, match=rf"tensor '{name}' is of no llama model of transformers; take it out or"):
        open_folder(llamas, "one")


@pytest.mark.parametrize("which", ["base", "one"])
def test_names_that_begin_otherwise_than_any_class_has_it_are_read_and_noted(llamas, which):
    tensors = {f"net.{name}": tensor for name, tensor in weights(llamas / which).items()}
    save_file(tensors, llamas / which / "model.safetensors", metadata={"format": "pt"})
    opened = open_folder(llamas, "one")
    reader = opened.base if which == "base" else opened.experts["one"]
    assert all(torch.equal(reader.tensor(name), tensors[f"net.{name}"]) for name in opened.names)
    (note,) = opened.notes.departures
    assert note.startswith(f"{llamas / which}: its names begin otherwise: net.") and not reader.extra
    assert all(name == stored for name, stored in opened.written.items())


def test_buffers_of_older_files_change_nothing(tmp_path):
    model = FAMILIES["gpt2"].build()
    model.save_pretrained(tmp_path / "base")
    perturbed(model, 1).save_pretrained(tmp_path / "one")
    for which in ("base", "one"):
        mask, value = torch.ones(1, 1, 8, 8), torch.tensor(-1e4)
        set_weights(tmp_path / which, transformer__h__0__attn__bias=mask, transformer__h__0__attn__masked_bias=value)
    opened = open_folder(tmp_path, "one")
    assert not opened.notes.departures and not any("masked" in name for name in opened.names)
    assert "the base: no weights, left out: transformer.h.0.attn.masked_bias" in opened.notes


@pytest.mark.parametrize("architectures", [None, ["LLaMAForCausalLM"], ["LlamaModel"]])
def test_an_output_layer_is_not_lost_by_what_the_config_says(llamas, architectures):
    edit_config(llamas / "base", architectures=architectures)
    merge(recipe_of(llamas, "one", **BE_THE_EXPERT), progress=False)
    found, expected = weights(llamas / "out"), weights(llamas / "one")
    torch.testing.assert_close(found["lm_head.weight"], expected["lm_head.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_that_only_experts_have_is_theirs(tmp_path, tied):
    model = FAMILIES["smollm2" if tied else "llama"].build()
    model.model.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        perturbed(model, seed).save_pretrained(tmp_path / name)
    settings: dict[str, Any] = {"merge": {"method": "average"}, "quantize": {"method": "none"}}
    report = merge(recipe_of(tmp_path, **settings), progress=False)
    note = "not in the base, the mean of the experts' takes its place: lm_head.weight"
    assert (note in report["notes"]) is not tied
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    one, two = (
        weights(tmp_path / n)["model.embed_tokens.weight" if tied else "lm_head.weight"] for n in ("one", "two")
    )
    torch.testing.assert_close(written.lm_head.weight.data, (one + two) / 2, rtol=0, atol=1e-6)


def test_heads_of_the_base_are_named_and_those_of_experts_kept(tmp_path):
    """As of bert-base-uncased, which has more of a head than the class that it names."""
    BertForPreTraining(tiny_bert().config).save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", architectures=["BertForMaskedLM"])
    expert = perturbed(BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3), 1)
    expert.save_pretrained(tmp_path / "one")
    set_weights(tmp_path / "one", cls__predictions__bias=torch.ones(32))
    opened = open_folder(tmp_path, "one")
    left = "cls.predictions.bias, cls.predictions.transform.LayerNorm.bias, cls.predictions.transform.LayerNorm.weight"
    assert f"in the base, left out: {left}, cls.predictions.transform.dense.bias and 3 more" in opened.notes.departures
    assert opened.experts["one"].head_tensors().keys() == {"classifier.weight", "classifier.bias"}
    assert "expert one: left out, since the merged model has none: cls.predictions.bias" in opened.notes.departures


def test_a_head_that_is_tied_in_its_class_is_whole(tmp_path):
    """A masked language model's file has no output layer: it is the expert's embeddings, not the merged ones."""
    tiny_bert().save_pretrained(tmp_path / "base")
    expert = perturbed(BertForMaskedLM.from_pretrained(tmp_path / "base"), 1).eval()
    expert.save_pretrained(tmp_path / "one")
    merge(recipe_of(tmp_path, "one", **BE_THE_EXPERT), progress=False)
    batch = padded_batches(1)[0]
    with torch.no_grad():
        found, wanted = epmq.load(tmp_path / "out")("one", **batch), expert(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_part_that_no_expert_has_is_named(tmp_path):
    clip().save_pretrained(tmp_path / "base")
    vision = transformers.CLIPVisionModel.from_pretrained(tmp_path / "base")
    perturbed(vision, 1).save_pretrained(tmp_path / "one")
    notes = open_folder(tmp_path, "one").notes
    assert len(notes) == 2 and notes.departures[0].startswith("in the base, left out: logit_scale, text_model.")


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_class_starts_with_stands_for_what_the_base_lacks(tmp_path, trained):
    model = FAMILIES["dinov2"].build()
    model.save_pretrained(tmp_path / "base")
    set_weights(tmp_path / "base", embeddings__mask_token=None)
    perturbed(model, 1).save_pretrained(tmp_path / "one")
    token = torch.full((1, 64), float(trained))
    set_weights(tmp_path / "one", embeddings__mask_token=token)
    report = merge(recipe_of(tmp_path, "one", **BE_THE_EXPERT), **{"progress": QUIET["progress"]})
    written = weights(tmp_path / "out")
    assert ("embeddings.mask_token" in written) is trained
    assert not trained or torch.equal(written["embeddings.mask_token"], token)
    text = "what its class starts with takes its place" if trained else "left out"
    assert f"not in the base, {text}: embeddings.mask_token" in report["notes"]


def test_long_lists_are_cut():
    assert listed(["a"]) == "a" and listed(list("abcdef")) == "a, b, c, d and 2 more"


def test_a_head_that_an_experts_file_lacks_is_noted(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).save_pretrained(tmp_path / "one")
    set_weights(tmp_path / "one", classifier__weight=None, classifier__bias=None)
    (note,) = [note for note in open_folder(tmp_path, "one").notes.departures if note.startswith("expert")]
    assert "BertForSequenceClassification has a head, but there is none in its file" in note
