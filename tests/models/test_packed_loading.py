"""Whole models whose weights stay in codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import edit_weights
from conftest import TEXTS, perturbed, recipe_for, tiny_bert, word_tokenizer
from families import FAMILIES, decoder, t5
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import epmq
from epmq.data.processors import load_processor
from epmq.export import packed
from epmq.export.form import Form
from epmq.models.blocks import linears
from epmq.models.codes import CodedCheckpoint
from epmq.models.multitask import WEIGHTS, NativeHead
from epmq.models.packed import PackedEmbedding, PackedLinear, PackedWeight
from epmq.models.packed_loading import load_packed
from epmq.quantization.grid import Grid
from epmq.quantization.rtn import rtn
from tests.kit.accelerator import pretended_accelerator

# Three grids: the first block's, the others', and the tables'.
GRIDS: dict[str, Any] = {
    "method": "rtn",
    "bits": 4,
    "group_size": 32,
    "overrides": [{"layers": r"re:.*\.0\..*", "bits": 3, "group_size": -1, "symmetric": False}],
}


def quantized(model: Any, folder: Path) -> Path:
    """A model as its own expert, rounded to nearest; its checkpoint."""
    if not (folder / "base").exists():
        for name in ("base", "one"):
            model.save_pretrained(folder / name)
    experts = [{"name": "one", "model": str(folder / "one")}]
    recipe = {"base": str(folder / "base"), "experts": experts, "output": str(folder / "out")}
    epmq.run({**recipe, "quantize": GRIDS}, progress=False, evaluate=False)
    return folder / "out"


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def held(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("family", ["dinov2", "clip", "t5", "bart", "gemma3", "smollm2"])
@torch.no_grad()
def test_every_family_computes_what_the_plain_model_does(family, tmp_path):
    folder = quantized(FAMILIES[family].build(), tmp_path)
    plain, quick, exact = (epmq.load(folder, weights=weights).backbone for weights in WEIGHTS)
    grids = CodedCheckpoint(folder).grids
    weights = [module for module in exact.modules() if isinstance(module, PackedWeight)]
    assert len(weights) == len(grids) and {weight.grid for weight in weights} == set(grids.values())
    assert not any(weight.has_kernel for weight in weights) and not exact.training
    for batch in FAMILIES[family].batches():
        expected, found, near = (tensors_of(model(**batch)) for model in (plain, exact, quick))
        assert found.keys() == expected.keys() == near.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
            assert (near[name] - value).norm() < 0.02 * value.norm(), name
    # What is plain is computed with in float32, and the file holds it in half of that; a kernel has scales of its own.
    others = sum(4 * p.numel() for p in exact.parameters()) + sum(4 * b.numel() for _, b in plain.named_buffers())
    size = (folder / "model.safetensors").stat().st_size
    assert held(exact) < size + others / 2 and held(quick) < held(exact) + size / 4


@pytest.mark.parametrize("build", [decoder("Llama", tie_word_embeddings=True), t5(gated=False)])
@torch.no_grad()
def test_text_is_written_as_by_the_plain_model(tmp_path, build):
    model = build()
    transformers.GenerationConfig(eos_token_id=[2, 9], decoder_start_token_id=0).save_pretrained(tmp_path / "own")
    for name in ("base", "one"):
        model.save_pretrained(tmp_path / name)
        shutil.copy(tmp_path / "own" / "generation_config.json", tmp_path / name)
    word_tokenizer().save_pretrained(tmp_path / "base")
    folder = quantized(model, tmp_path)
    plain, quick, exact = (epmq.load(folder, weights=weights) for weights in WEIGHTS)
    assert exact.generate(TEXTS, 6) == plain.generate(TEXTS, 6)
    assert len(quick.generate(TEXTS, 6)) == 3
    for loaded in (plain, exact, quick):
        assert loaded.backbone.generation_config.eos_token_id == [2, 9]
    table, output = exact.backbone.get_input_embeddings(), exact.backbone.get_output_embeddings()
    assert isinstance(table, PackedEmbedding) and isinstance(output, PackedLinear)
    assert table.packed is output.packed


@pytest.fixture(scope="module")
def heads(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool's experts with a head of their own, and one with a head of transformers' form."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(3)
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = transformers.BertForSequenceClassification(transformers.BertConfig.from_pretrained(pool / "base", **names))
    model.bert.load_state_dict(transformers.BertModel.from_pretrained(pool / "base").state_dict())
    perturbed(model, 3).save_pretrained(folder / "native")
    recipe = recipe_for(pool, quantize=GRIDS, output=str(folder / "out"))
    native = {**recipe["experts"][0], "name": "native", "model": str(folder / "native")}
    recipe["experts"].append(native)
    epmq.run(recipe, progress=False, evaluate=False)
    return folder / "out"


@torch.no_grad()
def test_heads_sit_on_a_packed_backbone(heads):
    plain, quick, exact = (epmq.load(heads, weights=weights) for weights in WEIGHTS)
    inputs = dict(load_processor(heads)(TEXTS, padding=True, return_tensors="pt"))
    assert exact.tasks == plain.tasks == ["native", "one", "two"] and exact.device.type == "cpu"
    for task in plain.tasks:
        expected = plain(task, **inputs)
        assert torch.equal(exact(task, **inputs), expected) and exact.labels(task) == plain.labels(task)
        assert (quick(task, **inputs) - expected).norm() < 0.02 * expected.norm()
        assert exact.answer(task, TEXTS) == plain.answer(task, TEXTS)
    assert exact.head("native").model.bert is exact.backbone


@torch.no_grad()
def test_heads_sit_on_parts_of_a_packed_model(tmp_path):
    """An encoder–decoder has parts, a packed table among them, that a task class takes one by one."""
    folder, ids = quantized(FAMILIES["t5"].build(), tmp_path), torch.tensor([[5, 6, 7]])
    config = transformers.T5Config.from_pretrained(tmp_path / "base", num_labels=3).to_dict()
    tensors = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    backbones = epmq.load(folder).backbone, load_packed(folder, dtype=torch.float32, kernels=False)
    plain, exact = (NativeHead(backbone, "T5ForTokenClassification", config, tensors) for backbone in backbones)
    assert exact.model.transformer.encoder is backbones[1].encoder
    assert torch.equal(exact(input_ids=ids), plain(input_ids=ids))


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "auto"])
@torch.no_grad()
def test_what_is_computed_in_is_what_the_plain_model_is_computed_in(tmp_path, dtype):
    folder = quantized(t5(gated=True)(), tmp_path)
    batch = FAMILIES["flan_t5"].batches()[0]
    plain, exact = (epmq.load(folder, dtype=dtype, weights=one).backbone for one in ("plain", "packed-exact"))
    dtypes = {name: parameter.dtype for name, parameter in plain.named_parameters(remove_duplicate=False)}
    for name, module in exact.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            assert module.weight.dtype == dtypes[f"{name}.weight"], name
    assert exact.dtype == plain.dtype and all(dtypes[name] == p.dtype for name, p in exact.named_parameters())
    assert torch.equal(exact(**batch).logits, plain(**batch).logits)


@torch.no_grad()
def test_a_packed_model_on_an_accelerator(heads):
    inputs = dict(load_processor(heads)(TEXTS, padding=True, return_tensors="pt"))
    expected = epmq.load(heads)("one", **inputs)
    with pretended_accelerator() as name:
        model = epmq.load(heads, device=name, dtype=torch.float32, weights="packed")
        assert model.device.type == name
        moved = {key: value.to(name) for key, value in inputs.items()}
        torch.testing.assert_close(model("one", **moved).cpu(), expected)


def test_what_cannot_be_kept_in_codes_is_refused(pool, heads, tmp_path):
    with pytest.raises(ValueError, match="weights: 'tiny' is not one of plain, packed, packed-exact"):
        epmq.load(heads, weights="tiny")
    with pytest.raises(ValueError, match="its weights are plain, so there are no codes"):
        epmq.load(pool / "base", weights="packed")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        epmq.load(tmp_path / "nothing", weights="packed")
    shutil.copytree(heads, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    with pytest.raises(ValueError, match=r"position_embeddings\.weight' is \[32, 64\], and .* be \[8, 64\]"):
        epmq.load(tmp_path / "out", weights="packed")
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(ValueError, match=r"config\.json: transformers cannot load this model"):
        epmq.load(tmp_path / "out", weights="packed")


@torch.no_grad()
def test_codes_of_layers_that_store_their_weight_transposed(tmp_path):
    """As a packed GPT-2 is on disk: codes are [out, in] whatever the module stores."""
    model = FAMILIES["gpt2"].build()
    tensors, forms = dict(model.state_dict()), {}
    tensors.pop("lm_head.weight")  # which follows the table
    for name, layer in linears(model):
        if isinstance(layer, Conv1D):
            weight, forms[name] = rtn(layer.weight.T, Grid(4, 32)), Form(Grid(4, 32))
            del tensors[f"{name}.weight"]
            tensors |= packed.tensors(name, weight, forms[name])
            layer.weight.copy_(weight.dequantize().T)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    model.config.architectures = ["GPT2LMHeadModel"]
    config = {**model.config.to_dict(), "quantization_config": packed.config(forms, [])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, batch = load_packed(tmp_path, dtype=torch.float32, kernels=False), FAMILIES["gpt2"].batches()[0]
    assert sum(isinstance(module, PackedWeight) for module in found.modules()) == 8
    torch.testing.assert_close(found(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_what_no_file_holds_is_as_the_class_makes_it(tmp_path):
    """A pooler that nobody trained: it is not computed with by anyone who knows, and the rest is as it was."""
    folder = quantized(tiny_bert(), tmp_path)
    edit_weights(folder, **{name: None for name in CodedCheckpoint(folder).checkpoint.names if "pooler" in name})
    model = load_packed(folder, dtype=torch.float32, kernels=False)
    assert not any(parameter.is_meta for parameter in model.parameters())
    plain, batch = epmq.load(folder).backbone, {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**batch).last_hidden_state, plain(**batch).last_hidden_state)
