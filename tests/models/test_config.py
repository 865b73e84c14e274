"""Configs as transformers understands them: fields by name, what is read, and changes."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES, clip, gpt2
from transformers import CLIPConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Mamba2Config

from epmq.models.config import ConfigReads, changed, config_fields, read_as


def llama(**fields: Any) -> dict[str, Any]:
    return LlamaConfig(vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **fields).to_dict()


def test_fields_have_dotted_names_in_sub_configs_and_dicts():
    fields = config_fields(clip().config)
    assert fields["text_config.eos_token_id"].value == 31 and fields["vision_config.patch_size"].value == 14
    assert fields["vision_config.patch_size"].owner.model_type == "clip_vision_model"
    fields = config_fields(read_as(LlamaConfig, llama()))
    assert fields["rope_parameters.rope_theta"].value == 1e4
    assert not any(name.startswith("_") for name in fields)


def test_what_only_a_head_or_the_start_of_training_takes_is_not_read():
    """`summary_type` is read in the same file, by a class that takes no part."""
    model = gpt2()
    reads, fields = ConfigReads(model), config_fields(model.config)
    read = {name for name, field in fields.items() if reads.reads(field)}
    assert {"n_head", "scale_attn_weights", "layer_norm_epsilon", "activation_function"} <= read
    assert read.isdisjoint({"summary_type", "summary_use_proj", "eos_token_id", "transformers_version"})


@pytest.mark.parametrize(("family", "counted"), [("roberta", True), ("bert", False), ("llama", False), ("t5", False)])
def test_padding_counts_positions_in_roberta(family, counted):
    assert ConfigReads(FAMILIES[family].build()).padding_counts_positions == counted


def test_without_source_everything_counts_as_read(monkeypatch):
    model = FAMILIES["llama"].build()

    def no_source(module: Any) -> str:
        raise OSError("no source")

    monkeypatch.setattr("epmq.models.config.inspect.getsource", no_source)
    reads = ConfigReads(model)
    assert reads.reads(config_fields(model.config)["pretraining_tp"]) and reads.padding_counts_positions


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5}),
        ({"rms_norm_eps": "1e-5"}, {"rms_norm_eps": 1e-5}),  # what YAML makes of it
        (
            {"rope_theta": 5.0, "tie_word_embeddings": True},
            {"rope_parameters.rope_theta": 5.0, "tie_word_embeddings": True},
        ),
        ({"rope_parameters": {"rope_theta": 5.0}}, {"rope_parameters.rope_theta": 5.0}),
        (
            {"rope_parameters.rope_type": "linear", "rope_parameters": {"factor": 2.0}},
            {"rope_parameters.rope_type": "linear", "rope_parameters.factor": 2.0},
        ),
    ],
)
def test_a_field_takes_another_value_and_nothing_else_changes(changes, expected, old):
    content = llama()
    if old:  # the names of before transformers 5
        content |= {"rope_theta": content.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    before = {name: field.value for name, field in config_fields(read_as(LlamaConfig, content)).items()}
    after = config_fields(read_as(LlamaConfig, changed(content, LlamaConfig, changes)))
    assert {name: field.value for name, field in after.items()} == {**before, **expected}


def test_fields_may_have_their_other_name_and_lie_in_sub_configs():
    content = changed(gpt2().config.to_dict(), GPT2Config, {"num_attention_heads": 2})
    assert content["n_head"] == 2 and "num_attention_heads" not in content
    content = changed(clip().config.to_dict(), CLIPConfig, {"text_config": {"hidden_act": "gelu"}})
    assert content["text_config"]["hidden_act"] == "gelu" and content["vision_config"]["hidden_act"] == "quick_gelu"
    content.pop("vision_config")  # class defaults
    content = changed(content, CLIPConfig, {"vision_config.image_size": 28})
    assert read_as(CLIPConfig, content).vision_config.image_size == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_ep": 1.0}, r"config\.rms_norm_ep: LlamaConfig has no such field; meant is rms_norm_eps\?"),
        ({"sliding_window": None}, r"config\.sliding_window: LlamaConfig has no such field"),
        ({"model_type": "bert"}, r"config\.model_type: LlamaConfig has no such field"),
        ({"rope_parameters.rope_teta": 1.0}, r"config\.rope_parameters\.rope_teta: .* no such field"),
        ({"rms_norm_eps.x": 1.0}, r"config\.rms_norm_eps\.x: .* no such field"),
        ({"_name_or_path": "x"}, r"config\._name_or_path: .* no such field"),
        ({"rms_norm_eps": "small"}, r"config\.rms_norm_eps: LlamaConfig does not take it"),
        ({"rope_parameters.rope_type": "linear"}, r"config\.rope_parameters\.rope_type: LlamaConfig does not take it"),
    ],
)
def test_what_is_no_field_or_no_value_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(llama(), LlamaConfig, changes)


def test_without_changes_the_content_is_the_same():
    content = LlamaForCausalLM(LlamaConfig(**llama())).config.to_dict()
    assert changed(content, LlamaConfig, {}) is content


def test_numbers_that_json_does_not_have_are_read():
    config = read_as(Mamba2Config, {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert tuple(config.time_step_limit) == (0.0, float("inf"))
