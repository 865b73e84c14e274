"""What lies beside the weights of an output."""

import json
import shutil

import pytest
import torch
from checkpoints import edit_weights, weights
from conftest import recipe_for
from safetensors import safe_open

from epmq.models.checkpoint import byte_size
from epmq.pipeline.output import weight_specs
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.recipe_file import load_recipe


def test_tokenizer_files_are_copied_as_they_are_and_nothing_else(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    base = tmp_path / "pool" / "base"
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "modeling_custom.py").write_text("raise SystemExit")
    output = tmp_path / "out"
    run(recipe_for(tmp_path / "pool", output=str(output), quantize={"method": "rtn"}), progress=False, evaluate=False)
    there = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert all((output / name).read_bytes() == (base / name).read_bytes() for name in there)
    beside = {"config.json", "model.safetensors", "heads", "report.json", "report.html", "README.md"}
    assert {file.name for file in output.iterdir()} == there | beside


@pytest.mark.parametrize("form", ["pack-quantized", "dequantized"])
@pytest.mark.parametrize("settings", [{"method": "none"}, {"method": "rtn", "bits": 3, "symmetric": False}])
def test_what_is_written_is_what_was_foreseen(pool, tmp_path, form, settings):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize=settings, format=form)
    specs = weight_specs(prepare(load_recipe(recipe), evaluate=False))
    report = run(recipe, progress=False, evaluate=False)
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in stored.items()}
    assert found == {name: (dtype, tuple(shape)) for name, (dtype, shape) in specs.items()}
    assert report["bytes"] == sum(map(byte_size, specs.values()))
    assert report["bytes"] == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())


def test_heads_lie_beside_the_weights(pool, tmp_path):
    report = run(recipe_for(pool, output=str(tmp_path / "out")), progress=False, evaluate=False)
    assert {file.stem for file in (tmp_path / "out" / "heads").iterdir()} == {"one", "two"} == set(report["heads"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"] and "quantization_config" in config


@pytest.mark.parametrize("form", ["pack-quantized", "dequantized"])
def test_layers_that_share_an_input_may_be_stored_in_different_dtypes(pool, tmp_path, form):
    shutil.copytree(pool, tmp_path / "pool")
    half = {"encoder__layer__0__attention__self__key__weight": lambda weight: weight.bfloat16()}
    edit_weights(tmp_path / "pool" / "base", **half)
    recipe = recipe_for(tmp_path / "pool", output=str(tmp_path / "out"), quantize={"method": "gptq"}, format=form)
    run(recipe, progress=False, evaluate=False)
    other = torch.float16 if form == "pack-quantized" else torch.float32  # of scales, or of weights
    dtypes = {
        name.rpartition("self.")[2].partition(".")[0]: tensor.dtype
        for name, tensor in weights(tmp_path / "out").items()
        if "layer.0.attention.self" in name and name.endswith(("weight_scale", "y.weight", "e.weight"))
    }
    assert dtypes == {**dict.fromkeys(("query", "value"), other), "key": torch.bfloat16}
