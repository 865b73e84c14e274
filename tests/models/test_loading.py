"""Whole models from disk."""

import json

import pytest
import torch
from conftest import padded_batches, recipe_for
from transformers import BertModel

from epmq.models.checkpoint import Checkpoint
from epmq.models.loading import load_model, plain_tensors, stored_dtype, why_not_direct
from epmq.pipeline.run import run


@pytest.fixture(scope="module")
def outputs(pool, tmp_path_factory):
    """The same quantized model, packed and plain."""
    folder = tmp_path_factory.mktemp("outputs")
    for name, form in (("packed", "pack-quantized"), ("plain", "dequantized")):
        recipe = recipe_for(pool, quantize={"method": "rtn", "bits": 3}, format=form, output=str(folder / name))
        run(recipe, progress=False, evaluate=False)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def test_packed_and_plain_files_are_one_model(outputs):
    packed, plain = (load_model(outputs / name, config_of(outputs / name)) for name in ("packed", "plain"))
    assert type(packed) is BertModel and not packed.training
    for name, tensor in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name
    batch = padded_batches(1, vocabulary=19)[0]
    assert torch.equal(packed(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    half = load_model(outputs / "packed", config_of(outputs / "packed"), dtype=torch.float16)
    assert {tensor.dtype for tensor in half.state_dict().values() if tensor.is_floating_point()} == {torch.float16}


def test_tensors_are_unpacked_one_by_one(outputs):
    packed, plain = Checkpoint(outputs / "packed"), Checkpoint(outputs / "plain")
    readers = plain_tensors(packed, packed.config["quantization_config"], stored_dtype(packed.config))
    assert set(readers) == set(plain.names) and set(plain_tensors(plain, {})) == set(plain.names)
    assert all(torch.equal(read(), plain.tensor(name)) for name, read in readers.items())


def test_what_transformers_cannot_load_is_named(outputs, tmp_path):
    with pytest.raises(ValueError, match="transformers cannot load this model"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery"}))
        (tmp_path / "model.safetensors").write_bytes((outputs / "plain" / "model.safetensors").read_bytes())
        load_model(tmp_path, {"model_type": "mystery"})


def test_whether_transformers_alone_can_open_a_checkpoint(outputs, tmp_path, capfd):
    for name in ("packed", "plain"):
        assert why_not_direct(outputs / name, config_of(outputs / name)) is None
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    assert "in transformers" in why_not_direct(tmp_path, {"model_type": "mystery"})
    assert capfd.readouterr().err == ""
