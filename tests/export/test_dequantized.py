import pytest
import torch
from conftest import perturbed
from transformers import GPT2Config, GPT2Model

from epmq.export import dequantized
from epmq.export.form import Form
from epmq.models.checkpoint import DTYPES
from epmq.models.codes import CodedCheckpoint
from epmq.models.multitask import load
from epmq.pipeline.run import run
from epmq.quantization.grid import Grid
from tests.kit.quantized import quantized_tensor


@pytest.mark.parametrize("output_format", ["dequantized", "pack-quantized"])
def test_layers_that_store_the_transpose_are_written_as_they_are(tmp_path, output_format):
    """GPT-2's `Conv1D` stores [in, out]: packed, only `epmq.load` and what reads codes know it."""
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=4)
    GPT2Model(config).save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("one", "two")):
        perturbed(GPT2Model.from_pretrained(tmp_path / "base"), seed).save_pretrained(tmp_path / task)
    experts = [{"name": task, "model": str(tmp_path / task)} for task in ("one", "two")]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "quantize": {"method": "rtn", "bits": 8}}
    output = {"output": str(tmp_path / "out"), "format": output_format}
    report = run({**recipe, **output}, progress=False, evaluate=False)
    merged = load(tmp_path / "out").backbone
    unread = [note for note in report["notes"] if "8 packed weights are not read by transformers" in note]
    assert len(unread) == (output_format == "pack-quantized")
    for name, weight in GPT2Model.from_pretrained(tmp_path / "one").state_dict().items():
        assert merged.state_dict()[name].shape == weight.shape
        assert (merged.state_dict()[name] - weight).abs().max() < 0.15, name
    if output_format == "pack-quantized":
        source = CodedCheckpoint(tmp_path / "out")
        for name in source.weights():
            assert torch.equal(source.tensor(name).float(), merged.state_dict()[name]), name
        assert source.codes("h.0.attn.c_attn").codes.shape == (192, 64)


@pytest.mark.parametrize("transposed", [False, True])
def test_tensors_are_as_their_specs_say_and_give_the_weight_back(transposed):
    weight = quantized_tensor(Grid(4, 32, False))
    form = Form(weight.grid, torch.bfloat16, torch.bfloat16, transposed)
    codes, before = weight.codes.clone(), weight.dequantize()
    tensors = dequantized.tensors("layer", weight, form)
    specs = dequantized.specs("layer", (5, 64), form)
    assert {name: (DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert list(tensors) == ["layer.weight"]
    assert torch.equal(dequantized.weight("layer", tensors.__getitem__, form), before)
    assert torch.equal(weight.codes, codes) and torch.equal(weight.dequantize(), before)
