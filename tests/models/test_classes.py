"""Which class a checkpoint is of, told from its config and its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import edit_config
from conftest import tiny_bert
from families import FAMILIES, clip, clip_vision
from transformers.models.bart.modeling_bart import BartEncoder

from epmq.models.checkpoint import Checkpoint
from epmq.models.classes import (
    config_of,
    fitting_classes,
    is_expected_missing,
    name_class,
    outline,
    related_classes,
    shared_checkpoint,
    shared_class,
    unread,
)

BERT = tiny_bert().config


def saved(model: Any, folder: Path, **fields: Any) -> Checkpoint:
    model.save_pretrained(folder)
    edit_config(folder, **fields)
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (FAMILIES["bert"].build, ["BertModel"]),
        (lambda: transformers.BertForMaskedLM(BERT), ["BertForMaskedLM"]),
        (lambda: transformers.BertForPreTraining(BERT), ["BertForPreTraining"]),
        (lambda: transformers.BertForTokenClassification(BERT), ["BertForTokenClassification"]),
        (FAMILIES["llama"].build, ["LlamaForCausalLM"]),
        (FAMILIES["smollm2"].build, ["LlamaForCausalLM", "LlamaModel"]),
        (FAMILIES["gpt2"].build, ["GPT2LMHeadModel", "GPT2Model"]),
        (FAMILIES["t5"].build, ["T5ForConditionalGeneration", "T5Model"]),
        (FAMILIES["vit"].build, ["ViTModel"]),
    ],
)
def test_a_class_is_found_from_the_tensors(tmp_path, build, names):
    checkpoint = saved(build(), tmp_path)
    assert [found.__name__ for found in fitting_classes(checkpoint, config_of(checkpoint))] == names


@pytest.mark.parametrize("old", [None, "LLaMAForCausalLM", "LlamaModel"])
def test_a_config_without_its_class_gets_it(tmp_path, old):
    checkpoint = saved(FAMILIES["llama"].build(), tmp_path, architectures=None if old is None else [old])
    note = name_class(checkpoint, must=True)
    assert note == f"config.json names {old or 'no class'}; by its tensors it is a LlamaForCausalLM"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"] and name_class(checkpoint, must=True) is None


def test_heads_that_look_the_same_must_be_named(tmp_path):
    config = transformers.BertConfig(**{**BERT.to_dict(), "num_labels": 1})
    model = transformers.BertForSequenceClassification(config)
    checkpoint = saved(model, tmp_path, architectures=None)
    with pytest.raises(ValueError, match=r"fit BertForMultipleChoice, BertForSequenceClassification: name the one"):
        name_class(checkpoint, must=True)
    assert name_class(checkpoint, must=False) is not None
    checkpoint.config["architectures"] = ["BertForMyTask"]
    assert name_class(checkpoint, must=True) is None and checkpoint.config["architectures"] == ["BertForMyTask"]


def test_the_shared_class_is_the_one_that_has_what_experts_bring(tmp_path):
    llama = saved(FAMILIES["llama"].build(), tmp_path / "whole")
    plain = saved(transformers.AutoModel.from_pretrained(tmp_path / "whole"), tmp_path / "plain")
    whole, backbone = transformers.LlamaForCausalLM, transformers.LlamaModel
    assert shared_class(llama, [plain]) is whole and shared_class(plain, [plain, llama]) is whole
    assert shared_class(plain, [plain]) is backbone
    masked = saved(transformers.BertForMaskedLM(BERT), tmp_path / "masked")
    assert shared_class(masked, [masked]) is transformers.BertModel


def test_buffers_of_older_files_are_passed_over(tmp_path):
    llama = saved(FAMILIES["llama"].build(), tmp_path / "llama")
    model = outline(transformers.LlamaForCausalLM, config_of(llama), llama)
    old = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.q_proj.bias"]
    assert unread(model, [*llama.names, *old]) == old[1:]
    bert = saved(tiny_bert(), tmp_path / "bert")
    model = outline(transformers.BertModel, config_of(bert), bert)
    assert unread(model, ["bert.embeddings.position_ids", "bert.embeddings.LayerNorm.gamma", "stray"]) == ["stray"]


def test_what_a_class_need_not_find_in_a_file():
    model = FAMILIES["bart"].build()
    assert is_expected_missing(model, "final_logits_bias") and not is_expected_missing(model, "lm_head.weight")


def test_all_classes_of_a_config_are_known():
    names = [found.__name__ for found in related_classes(BERT)]
    assert {"BertModel", "BertForMaskedLM", "BertForQuestionAnswering"} <= set(names)
    assert not [name for name in names if name.endswith("PreTrainedModel")]


def test_a_part_is_shared_where_all_experts_are_that_part(tmp_path):
    clip().save_pretrained(tmp_path / "whole")
    clip_vision().save_pretrained(tmp_path / "part")
    whole, part = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "part")
    assert shared_checkpoint(whole, [part, part]) is part
    assert shared_checkpoint(whole, [whole, part]) is whole and shared_checkpoint(whole, []) is whole


def test_a_half_of_an_encoder_decoder_is_shared_where_all_experts_are_that_half(tmp_path):
    whole = saved(FAMILIES["bart"].build(), tmp_path / "whole")
    half = saved(BartEncoder(FAMILIES["bart"].build().config), tmp_path / "half")
    assert shared_checkpoint(whole, [half, half]) is half and shared_class(half, [half]) is BartEncoder
    assert shared_checkpoint(whole, [half, whole]) is whole
    backbone = saved(FAMILIES["bart"].build().model, tmp_path / "backbone")
    assert shared_checkpoint(whole, [backbone]) is whole  # which lacks no block
