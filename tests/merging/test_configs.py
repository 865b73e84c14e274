"""Configs of base and experts that differ: where that matters, and where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import adapt
from checkpoints import GONE, edit_config
from conftest import padded_batches, perturbed
from families import FAMILIES, clip, text_model
from merges import AVERAGE, open_folder, recipe_of
from transformers import AutoModelForCausalLM, BertModel, CLIPVisionModel

import epmq
from epmq.pipeline.run import merge


def modernbert() -> Any:
    windows = {"local_attention": 8, "global_attn_every_n_layers": 2, "max_position_embeddings": 40}
    return text_model(transformers.ModernBertConfig, transformers.ModernBertModel, **windows)


def deberta() -> Any:
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    return text_model(
        transformers.DebertaV2Config, transformers.DebertaV2Model, position_biased_input=False, **positions
    )


def granite() -> Any:
    return text_model(transformers.GraniteConfig, transformers.GraniteForCausalLM, num_key_value_heads=2)


def esm() -> Any:
    fields = {"max_position_embeddings": 40, "mask_token_id": 4, "token_dropout": True}
    return text_model(transformers.EsmConfig, transformers.EsmModel, position_embedding_type="rotary", **fields)


BUILD: dict[str, Callable[[], Any]] = {name: family.build for name, family in FAMILIES.items()}
BUILD |= {"modernbert": modernbert, "deberta": deberta, "granite": granite, "esm": esm}
OLD_ROPE = {"rope_parameters": GONE}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with `base` and `one`, the same model twice, a family each."""
    folder = tmp_path_factory.mktemp("pairs")

    def pair(family: str) -> Path:
        if not (folder / family).exists():
            model = BUILD[family]()
            for name in ("base", "one"):
                model.save_pretrained(folder / family / name)
        return folder / family

    return pair


@pytest.fixture
def opened(pairs: Any, tmp_path: Path) -> Callable[..., Any]:
    """Opens a pair whose configs are edited first."""

    def open_pair(family: str, one: dict[str, Any], base: dict[str, Any] | None = None, **fields: Any) -> Any:
        folder = shutil.copytree(pairs(family), tmp_path / family)
        edit_config(folder / "base", **base or {})
        edit_config(folder / "one", **one)
        return open_folder(folder, "one", **fields)

    return open_pair


DIFFERENT = [
    ("llama", {"rms_norm_eps": 1e-2}, r"rms_norm_eps is 0\.01 \(1e-06 in the base\)"),
    ("llama", {"rope_parameters__rope_theta": 1e6}, r"rope_parameters\.rope_theta is 1000000\.0 \(10000\.0"),
    ("llama", {**OLD_ROPE, "rope_theta": 1e6}, r"rope_parameters\.rope_theta is 1000000\.0 \(10000\.0"),
    ("llama", {**OLD_ROPE, "rope_scaling": {"type": "linear", "factor": 4.0}}, r"rope_type is 'linear' \('default'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu' \\('silu'"),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, "num_attention_heads is 8"),
    ("mistral", {"sliding_window": None}, r"sliding_window is None \(4"),
    ("gemma3", {"sliding_window": 8}, r"sliding_window is 8 \(4"),
    ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types is"),
    ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}, r"logits_scaling is 2\.0.*residual_multiplier is"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    ("t5", {"relative_attention_max_distance": 9}, "relative_attention_max_distance is 9"),
    ("t5", {"feed_forward_proj": "gelu", "dense_act_fn": "gelu"}, "feed_forward_proj is 'gelu'.*dense_act_fn is"),
    ("bert", {"layer_norm_eps": 1e-3}, r"layer_norm_eps is 0\.001"),
    ("bert", {"is_decoder": True}, "is_decoder is True"),
    ("roberta", {"pad_token_id": 1}, "pad_token_id is 1"),
    ("clip", {"text_config__eos_token_id": 30}, r"text_config\.eos_token_id is 30"),
    ("clip", {"vision_config__hidden_act": "gelu"}, r"vision_config\.hidden_act is 'gelu'"),
    ("modernbert", {"local_attention": 16}, "local_attention is 16"),
    ("modernbert", {**OLD_ROPE, "global_rope_theta": 1e4}, r"rope_parameters\.full_attention\.rope_theta is 10000"),
    ("deberta", {"position_buckets": 4}, "position_buckets is 4"),  # no field of the class, but read by its code
    ("esm", {"token_dropout": False}, "token_dropout is False"),  # a dropout that is no rate
]


@pytest.mark.parametrize(("family", "one", "message"), DIFFERENT)
def test_a_field_that_changes_what_is_computed_is_named(opened, family, one, message):
    with pytest.raises(ValueError, match=rf"^expert one: .*{message}.*set config\..*one/config\.json") as error:
        opened(family, one)
    assert "\n" not in str(error.value)


ALIKE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {**OLD_ROPE, "rope_theta": 1e4, "rope_scaling": None}, {}),
    ("llama", {**OLD_ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": LINEAR}),
    ("llama", {"head_dim": GONE, "attention_bias": GONE, "mlp_bias": GONE}, {}),
    ("llama", {"torch_dtype": "bfloat16", "dtype": GONE, "transformers_version": "4.30.0", "_name_or_path": "x"}, {}),
    ("llama", {"id2label": {"0": "a", "1": "b", "2": "c"}}, {}),
    ("modernbert", {**OLD_ROPE, "global_rope_theta": 160000.0, "local_rope_theta": 1e4}, {}),
    ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
    ("bert", {"vocab_size": 32, "finetuning_task": "sst2", "problem_type": "regression"}, {}),
]


@pytest.mark.parametrize(("family", "one", "base"), ALIKE)
def test_what_transformers_reads_alike_is_alike(opened, family, one, base):
    assert opened(family, one, base).notes == []


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"use_cache": False, "pad_token_id": None, "eos_token_id": [2, 3], "bos_token_id": 5}),
    ("llama", {"max_position_embeddings": 99999, "attention_dropout": 0.1, "initializer_range": 0.5}),
    ("llama", {"pretraining_tp": 2, "some_day": {"a": 1}}),
    ("qwen2", {"max_window_layers": 21}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}),  # from the 28th layer on
    ("bert", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2, "gradient_checkpointing": True}),
    ("bert", {"pad_token_id": 3, "position_embedding_type": "absolute"}),
    ("modernbert", {"classifier_pooling": "mean", "deterministic_flash_attn": True}),
    ("clip", {"text_config__attention_dropout": 0.1, "logit_scale_init_value": 1.0}),
    ("gpt2", {"summary_use_proj": False, "resid_pdrop": 0.3}),
]


@pytest.mark.parametrize(("family", "one"), HARMLESS)
def test_a_field_that_cannot_matter_is_noted(opened, family, one):
    experts = opened(family, one)
    (note,) = experts.notes
    assert note.startswith("expert one: differs in what changes no result of the merged model: ")
    assert all(name.replace("__", ".") in note for name in one if name != "use_sliding_window")
    assert experts.notes.departures == []


@pytest.mark.parametrize(("rope", "matters"), [(LINEAR, False), (DYNAMIC, True)])
def test_the_number_of_positions_matters_where_the_frequencies_follow_from_it(opened, rope, matters):
    changes = {"rope_parameters": rope}
    if matters:
        with pytest.raises(ValueError, match="max_position_embeddings is 99"):
            opened("llama", {**changes, "max_position_embeddings": 99}, changes)
    else:
        assert opened("llama", {**changes, "max_position_embeddings": 99}, changes).notes.departures == []


def test_fields_at_the_top_of_an_old_config_are_those_of_its_sub_config(opened):
    """As in a Qwen2-VL of before transformers 4.52; what is read is in `text_config`, wherever it is from."""
    assert opened("clip", {"num_hidden_layers": 7, "hidden_act": "gelu"}).notes == []


def test_a_config_that_transformers_cannot_read_is_named(opened):
    with pytest.raises(ValueError, match=r"one/config\.json: transformers cannot open this model"):
        opened("llama", {"rope_parameters": {"rope_type": "linear"}})


# --- the recipe decides ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_recipe_may_give_a_field_its_value(pairs, tmp_path):
    """In the model that is merged and in the one that is written; every difference from it is a departure."""
    folder = shutil.copytree(pairs("llama"), tmp_path / "llama")
    perturbed(AutoModelForCausalLM.from_pretrained(folder / "base"), 1).save_pretrained(folder / "one")
    edit_config(folder / "one", rms_norm_eps=1e-2)
    recipe = recipe_of(folder, "one", **AVERAGE, config={"rms_norm_eps": 1e-2})
    report = merge(recipe, progress=False)
    note = "base: rms_norm_eps is 1e-06 (0.01 in what is merged), as the recipe's config says"
    assert report["notes"] == [note]
    ids = padded_batches(1)[0]["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(folder / "one")(ids).logits
    for model in (AutoModelForCausalLM.from_pretrained(folder / "out"), epmq.load(folder / "out").backbone):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="strict: base: rms_norm_eps is"):
        merge({**recipe, "output": str(folder / "again")}, progress=False, strict=True)


def test_a_third_value_departs_from_base_and_expert(opened):
    experts = opened("llama", {"rope_parameters__rope_theta": 1e6}, config={"rope_theta": 5e5})
    assert [note.partition(":")[0] for note in experts.notes.departures] == ["base", "expert one"]
    assert experts.model.config.rope_parameters["rope_theta"] == 5e5


def test_fields_without_a_value_in_the_recipe_still_have_to_agree(opened):
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu' \('silu' in what is merged\); .*set config.hidden_act"):
        opened("llama", {"hidden_act": "gelu", "rms_norm_eps": 1e-2}, config={"rms_norm_eps": 1e-2})


# --- a part of the base --------------------------------------------------------------------------------------------


@pytest.fixture
def towers(tmp_path: Path) -> Path:
    clip().save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        CLIPVisionModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / name)
    return tmp_path


def test_experts_of_a_part_are_compared_with_the_bases_sub_config(towers):
    _, left_out = open_folder(towers).notes
    assert left_out.startswith("in the base, left out: logit_scale, text_model")
    edit_config(towers / "one", hidden_act="gelu")
    with pytest.raises(ValueError, match=r"expert one: hidden_act is 'gelu' \('quick_gelu' in the base\)"):
        open_folder(towers)
    edit_config(towers / "two", hidden_act="gelu")
    experts = open_folder(towers, config={"hidden_act": "gelu"})
    said = "base: hidden_act is 'quick_gelu' ('gelu' in what is merged), as the recipe's config says"
    assert experts.notes[2:] == [said]
    assert experts.config["hidden_act"] == "gelu"


def test_an_adapter_has_no_config_of_its_own(pairs, tmp_path):
    """What lies beside it is its trainer's."""
    folder = shutil.copytree(pairs("bert"), tmp_path / "bert")
    adapt(BertModel.from_pretrained(folder / "base"), folder / "lora", target_modules=["query"])
    shutil.copyfile(folder / "one" / "config.json", folder / "lora" / "config.json")
    edit_config(folder / "lora", layer_norm_eps=1.0)
    assert open_folder(folder, "lora").notes == []
