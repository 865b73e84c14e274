"""Checkpoints that do not fit the base, or fit it in part."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import weights
from conftest import recipe_for
from families import clip
from merges import AVERAGE, QUIET, open_folder, recipe_of, set_weights
from transformers import BertForSequenceClassification, CLIPVisionModel

import epmq
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.run import merge, run


@pytest.mark.parametrize("which", ["base", "two"])
def test_what_is_quantized_already_is_refused(berts, which):
    run(recipe_of(berts, quantize={"method": "rtn"}), **QUIET)
    (berts / which).rename(berts / "old")
    (berts / "out").rename(berts / which)
    with pytest.raises(ValueError, match=r"quantized already; give the (model|one) it was quantized from"):
        open_folder(berts)


def test_vision_and_whole_experts_do_not_mix(tmp_path):
    clip().save_pretrained(tmp_path / "base")
    clip().save_pretrained(tmp_path / "one")
    CLIPVisionModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="expert two: model type 'clip_vision_model', but the base is 'clip'"):
        open_folder(tmp_path)


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
