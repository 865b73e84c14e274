import pytest
import torch
from conftest import perturbed
from transformers import GPT2Config, GPT2Model

from epmq.export import dequantized
from epmq.export.form import Form
from epmq.models.checkpoint import DTYPES
from epmq.pipeline.run import run
from epmq.quantization.grid import Grid
from tests.kit.quantized import quantized_tensor


def test_layers_that_are_no_linear_are_written_plain_or_refused(tmp_path):
    """GPT-2's `Conv1D` stores the transpose, which pack-quantized has no form for."""
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=4)
    GPT2Model(config).save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("one", "two")):
        perturbed(GPT2Model.from_pretrained(tmp_path / "base"), seed).save_pretrained(tmp_path / task)
    experts = [{"name": task, "model": str(tmp_path / task)} for task in ("one", "two")]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "quantize": {"method": "rtn", "bits": 8}}
    output = {"output": str(tmp_path / "out")}
    run({**recipe, **output, "format": "dequantized"}, progress=False, evaluate=False)
    merged = GPT2Model.from_pretrained(tmp_path / "out")
    for name, weight in GPT2Model.from_pretrained(tmp_path / "one").state_dict().items():
        assert merged.state_dict()[name].shape == weight.shape
        assert (merged.state_dict()[name] - weight).abs().max() < 0.15, name
    with pytest.raises(ValueError, match=r"pack-quantized.*h\.0\.attn\.c_attn|h\.0\.attn\.c_attn.*pack-quantized"):
        run({**recipe, "output": str(tmp_path / "packed")}, progress=False, evaluate=False)
    assert not (tmp_path / "packed").exists()


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
