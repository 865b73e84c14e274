"""Checkpoints that do not fit the base, or fit it in part."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapt, edit
from checkpoints import weights
from conftest import perturbed, recipe_for
from families import FAMILIES
from merges import AVERAGE, QUIET, open_folder, recipe_of, set_weights
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    CLIPTextModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlamaModel,
    T5EncoderModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import epmq
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.run import merge, run
from tests.kit.architectures import ARCHITECTURES

HALF = {"method": "task_arithmetic", "scaling": 0.5}


@pytest.mark.parametrize("which", ["base", "two"])
def test_what_is_quantized_already_is_refused(berts, which):
    run(recipe_of(berts, quantize={"method": "rtn"}), **QUIET)
    (berts / which).rename(berts / "old")
    (berts / "out").rename(berts / which)
    with pytest.raises(ValueError, match=r"quantized already; give the (model|one) it was quantized from"):
        open_folder(berts)


def test_a_pickle_is_opened_only_if_it_is_named(berts, caplog):
    merge(recipe_of(berts, **AVERAGE), progress=False)
    expected = weights(berts / "out")
    for name in ("base", "two"):
        torch.save(weights(berts / name), berts / name / "pytorch_model.bin")
        (berts / name / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"base: no .* \(pytorch_model\.bin is a pickle: name that file"):
            open_folder(berts)
    recipe = recipe_of(berts, "one", "two/pytorch_model.bin", **AVERAGE, output=str(berts / "again"))
    report = merge({**recipe, "base": str(berts / "base" / "pytorch_model.bin")}, progress=False)
    for name in ("base", "two"):
        note = (
            f"{berts / name / 'pytorch_model.bin'} is a pickle: only tensors were read from it; safetensors are safer"
        )
        assert note in report["notes"] and note in caplog.messages
    found = weights(berts / "again")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list((berts / "again").glob("*.bin"))


def test_a_head_of_a_class_that_transformers_lacks_is_left_out(pool, tmp_path):
    model = BertForSequenceClassification.from_pretrained(pool / "base", num_labels=3)
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMyTask"]}))
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "rtn"})
    recipe["experts"][0]["model"] = str(tmp_path / "one")
    report = run(recipe, **QUIET)
    assert "expert one: transformers has no class BertForMyTask, its head is left out" in report["notes"]
    assert epmq.load(tmp_path / "out").tasks == ["two"]
    with pytest.raises(ValueError, match=r"experts\.one: evaluation needs a head"):
        evaluate_experts(recipe, progress=False)


def test_an_integer_buffer_is_the_bases_and_integer_weights_are_refused(berts):
    set_weights(berts / "base", embeddings__position_ids=torch.arange(32)[None])
    merge(recipe_of(berts, **AVERAGE), progress=False)
    set_weights(berts / "two", pooler__dense__weight=torch.ones(64, 64).int())
    with pytest.raises(ValueError, match=r"expert two: tensor 'pooler\.dense\.weight' is I32, not a float"):
        open_folder(berts)
    set_weights(berts / "base", pooler__dense__weight=torch.ones(64, 64).int())
    with pytest.raises(ValueError, match=r"base: tensor 'pooler\.dense\.weight' is I32, not float64, 32, 16"):
        open_folder(berts)


def test_a_tensor_outside_the_blocks_that_an_expert_lacks_is_the_bases(berts):
    set_weights(berts / "two", pooler__dense__weight=None, embeddings__LayerNorm__bias=None)
    report = merge(recipe_of(berts, merge={"method": "task_arithmetic", "scaling": 1.0}), progress=False)
    found, base, one = (weights(berts / name) for name in ("out", "base", "one"))
    for name in ("pooler.dense.weight", "embeddings.LayerNorm.bias"):
        torch.testing.assert_close(found[name], one[name], rtol=0, atol=1e-6)
        assert f"expert two has no tensor {name}: the base's takes its place" in report["notes"]
        assert not torch.equal(one[name], base[name])
    set_weights(berts / "two", encoder__layer__1__attention__output__dense__bias=None)
    with pytest.raises(ValueError, match=r"two: tensor 'encoder\.layer\.1\.attention\.output\.dense\.bias' is missing"):
        open_folder(berts)


# --- wrappers, and parts of a model ---------------------------------------------------------------------------------


def rename_all(path: Path, change: Callable[[str], str]) -> None:
    file = path / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("around", ["_orig_mod.", "module.", "base_model.model.", "inner"])
def test_wrappers_around_modules_are_taken_off_and_noted(tmp_path, around):
    model = FAMILIES["llama"].build()
    for name, seed in (("base", 0), ("one", 1)):
        perturbed(copy.deepcopy(model), seed).save_pretrained(tmp_path / name)
    plain = open_folder(tmp_path, "one")
    wanted = {name: plain.experts["one"].tensor(name) for name in plain.names}
    inner = "self_attn._orig_mod."
    rename_all(tmp_path / "one", lambda n: n.replace("self_attn.", inner) if around == "inner" else around + n)
    rename_all(tmp_path / "base", lambda name: f"_orig_mod.{name}")
    opened = open_folder(tmp_path, "one")
    assert opened.written == plain.written and opened.names == plain.names
    assert all(torch.equal(opened.experts["one"].tensor(name), tensor) for name, tensor in wanted.items())
    assert len(opened.notes.departures) == 2
    assert opened.notes[0] == "the base: taken off the names of its tensors: _orig_mod"


def part_of(whole: Any, named: Any, path: str, config: Any = None) -> Any:
    """A part of a model by itself, moved a little; with its own copy of the output layer, where it has one."""
    part = named(config or whole.config)
    part.base_model.load_state_dict(whole.get_submodule(path).state_dict(), strict=False)
    if hasattr(part, "lm_head"):
        part.lm_head.load_state_dict(whole.lm_head.state_dict())
    return perturbed(part.eval(), 3)


def text_of(whole: Any, named: Any = LlamaForCausalLM) -> Any:
    return part_of(whole, named, "model.language_model", whole.config.text_config)


# Architecture of the base, what the experts are of it, and where that is in it.
PARTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "text": ("llava", text_of, "model.language_model"),
    "text without output layer": ("llava", lambda whole: text_of(whole, LlamaModel), "model.language_model"),
    "tower": (
        "llava",
        lambda whole: part_of(whole, CLIPVisionModel, "model.vision_tower", whole.config.vision_config),
        "model.vision_tower",
    ),
    "encoder": ("whisper", lambda whole: part_of(whole, WhisperEncoder, "model.encoder"), "model.encoder"),
    "encoder of T5": ("t5", lambda whole: part_of(whole, T5EncoderModel, ""), ""),
}


@pytest.mark.parametrize("name", PARTS)
def test_experts_that_are_all_one_part_of_the_base_are_merged_as_that_part(tmp_path, name):
    architecture, make, path = PARTS[name]
    whole = ARCHITECTURES[architecture].build()
    whole.save_pretrained(tmp_path / "base")
    part = make(whole)
    part.save_pretrained(tmp_path / "one")
    report = merge(recipe_of(tmp_path, "one", merge=HALF), progress=False)
    found, info = type(part).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    start, end = whole.get_submodule(path).state_dict(), part.base_model.state_dict()
    for key, tensor in found.base_model.state_dict().items():
        torch.testing.assert_close(tensor, (start[key] + end[key]) / 2)
    if hasattr(part, "lm_head"):
        torch.testing.assert_close(found.lm_head.weight, (whole.lm_head.weight + part.lm_head.weight) / 2)
    assert type(epmq.load(tmp_path / "out").backbone) is type(part)
    assert report["notes"][0] == f"all experts are one part of the base, which alone is merged: {type(part).__name__}"


@pytest.mark.parametrize("named", [LlamaForCausalLM, LlamaModel])
def test_an_expert_that_is_a_part_is_merged_into_the_whole_beside_another_that_is_whole(tmp_path, named):
    whole = ARCHITECTURES["llava"].build()
    part = text_of(whole, named)
    whole.save_pretrained(tmp_path / "base")
    part.save_pretrained(tmp_path / "one")
    whole.save_pretrained(tmp_path / "two")
    opened = open_folder(tmp_path)
    for name in opened.names:
        expert = opened.experts["one"].tensor(name)
        inner = name.replace("model.language_model.", "model." if named is LlamaForCausalLM else "")
        own = part.state_dict().get(inner)
        assert torch.equal(expert, opened.base.tensor(name) if own is None else own), name
    (note,) = [note for note in opened.notes if "a part of the model" in note]
    assert note.startswith(f"expert one is a {named.__name__}") and "model.multi_modal_projector" in note


def test_a_part_that_computes_otherwise_than_the_bases_is_refused(tmp_path):
    whole = ARCHITECTURES["llava"].build()
    for name in ("base", "two"):
        whole.save_pretrained(tmp_path / name)
    part = text_of(whole)
    part.config.rms_norm_eps = 0.1
    part.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"expert one: text_config.rms_norm_eps is 0.1 \(1e-06 in the base\)"):
        open_folder(tmp_path)


@pytest.mark.parametrize("trained", ["whole", "causal", "backbone"])
def test_an_adapter_may_be_trained_on_the_language_model_alone(tmp_path, trained):
    whole = ARCHITECTURES["llava"].build()
    whole.save_pretrained(tmp_path / "base")
    make = {"whole": lambda: copy.deepcopy(whole), "causal": lambda: text_of(whole)}
    model = make.get(trained, lambda: text_of(whole, LlamaModel))()
    start = model.get_submodule("model.language_model" if trained == "whole" else "").base_model.state_dict()
    layer = "layers.1.self_attn.v_proj.weight"
    before = start[layer if layer in start else f"model.{layer}"].clone()
    adapted = adapt(model, tmp_path / "one", target_modules=["q_proj", "v_proj"]).merge_and_unload()
    after = next(value for name, value in adapted.state_dict().items() if name.endswith(layer) and "vision" not in name)
    opened = open_folder(tmp_path, "one")
    name = f"model.language_model.{layer}"
    found = opened.experts["one"].tensor(name) - opened.base.tensor(name)
    torch.testing.assert_close(found, after - before, atol=1e-5, rtol=1e-4)
    assert not opened.experts["one"].extra


@pytest.mark.parametrize("known", [False, True])
def test_an_adapter_that_may_be_of_two_parts_needs_its_class(tmp_path, known):
    whole = ARCHITECTURES["clip"].build()
    whole.save_pretrained(tmp_path / "base")
    part = part_of(whole, CLIPTextModel, "text_model", whole.config.text_config)
    adapt(part, tmp_path / "one", target_modules=["q_proj"])
    if not known:
        edit(tmp_path / "one", auto_mapping=None)
        with pytest.raises(ValueError, match="one: its tensors may be those of text_model or of vision_model"):
            open_folder(tmp_path, "one")
        return
    stored = open_folder(tmp_path, "one").experts["one"].stored
    assert list(stored) == [f"text_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
