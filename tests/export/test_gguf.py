"""GGUF files: every code of a checkpoint, under llama.cpp's names, and what it does not have is refused before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import padded_batches
from families import FAMILIES, decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from epmq import run
from epmq.errors import InputError
from epmq.export import gguf as target
from epmq.export.gguf_models import complete, extra_tensors, query_factor, row_order
from epmq.models.codes import CodedCheckpoint
from epmq.pipeline.exporting import contents_of, export_checkpoint

gguf = pytest.importorskip("gguf")

GRID = {"bits": 4, "group_size": 32}


def byte_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs with 32 tokens."""
    tokens = ["<pad>", "<s>", "</s>", "Ċ", "Ġ", *"abcdefghijklmnopqrstuvwxy", "ab", "cd"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("c", "d")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def packed(folder: Path, model: Any, tokenizer: bool = False, **quantize: Any) -> CodedCheckpoint:
    """A model, rounded to nearest and packed. Its norms are not ones, and its attention is not flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=generator)
            )
    model.save_pretrained(folder / "base")
    if tokenizer:
        byte_pairs().save_pretrained(folder / "base")
    experts = [{"name": "one", "model": str(folder / "base")}]
    recipe = {"base": str(folder / "base"), "experts": experts, "output": str(folder / "packed")}
    run({**recipe, "quantize": {"method": "rtn", **GRID, **quantize}}, evaluate=False, progress=False)
    return CodedCheckpoint(folder / "packed")


def tensors_of(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name → type and numbers in float32 of all tensors of a file."""
    reader = gguf.GGUFReader(file)
    return {
        one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors
    }


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


TEXTS = [name for name in FAMILIES if name not in ("vit", "dinov2", "clip", "clip_vision", "bart")]


@pytest.mark.parametrize("family", [*TEXTS, "gemma2"])
def test_every_code_of_a_family_is_in_the_file(tmp_path, family):
    """Weights are equal to the last bit, their rows in the file's order."""
    build = decoder("Gemma2", head_dim=16, query_pre_attn_scalar=16) if family == "gemma2" else FAMILIES[family].build
    source = packed(tmp_path, build())
    target.check(contents_of(source))
    (file,) = target.write(source, tmp_path)
    found, config = tensors_of(file), complete(source.config)
    assert file.name == "model-q4_0.gguf"
    names = target.Names(config)
    for layer in source.grids:
        weight, order = source.codes(layer), row_order(config, f"{layer}.weight")
        exact = replace(weight, dtype=torch.float32).dequantize()
        name = names.get(f"{layer}.weight")
        if name is None:
            assert layer == "pooler.dense"
            continue
        kind, stored = found.pop(name)
        assert np.array_equal(stored, (exact if order is None else exact[order]).numpy()), layer
        assert kind == ("Q8_0" if weight.grid.bits == 8 else "Q4_0")
    assert all(kind == "F32" or len(values.shape) > 1 for kind, values in found.values())
    norms = [name for name in source.plain if "norm" in name.lower() and name.endswith("weight")]
    if family.startswith("gemma"):
        name = next(name for name in norms if name.endswith("input_layernorm.weight"))
        assert np.array_equal(found[names.get(name)][1], source.tensor(name).float().numpy() + 1)


def test_llama_turns_neighbours():
    """Rows of two halves of a head, one after the other, become pairs."""
    config = complete({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1})
    assert row_order(config, "model.layers.0.self_attn.q_proj.weight").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(config, "model.layers.0.self_attn.k_proj.bias").tolist() == [0, 2, 1, 3]
    assert row_order(config, "model.layers.0.self_attn.v_proj.weight") is None
    assert row_order(complete({"model_type": "qwen2"}), "model.layers.0.self_attn.q_proj.weight") is None


def test_llama_3_slows_its_low_frequencies_down():
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = complete({"model_type": "llama", "head_dim": 64, "rope_parameters": scaling})
    factors = extra_tensors(config)["rope_freqs.weight"]
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 8 and bool((factors.diff() >= -1e-6).all())


def test_the_largest_gemmas_scale_queries_by_their_width():
    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 168}
    assert query_factor(complete({"model_type": "gemma3_text", "num_hidden_layers": 62, **sizes})) == 1
    assert query_factor(complete({"model_type": "gemma3_text", "num_hidden_layers": 26, **sizes})) == (128 / 168) ** 0.5


def test_settings_and_tokens_are_in_the_file(tmp_path):
    source = packed(tmp_path, FAMILIES["llama"].build(), tokenizer=True)
    (file,) = target.write(source, tmp_path)
    fields = fields_of(file)
    for name, value in {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }.items():
        assert fields[name] == value, name
    assert fields["tokenizer.ggml.tokens"][-2:] == ["ab", "cd"]
    assert fields["tokenizer.ggml.token_type"] == [3, 3, 3] + [1] * 29


def test_what_is_not_rounded_keeps_its_dtype(tmp_path):
    skipped = [{"layers": "*.mlp.down_proj", "skip": True}, {"layers": "*.q_proj", "bits": 8, "group_size": 64}]
    source = packed(tmp_path, FAMILIES["llama"].build().to(torch.bfloat16), overrides=skipped, scale_dtype="float16")
    target.check(contents_of(source))
    (file,) = target.write(source, tmp_path)
    found = tensors_of(file)
    kind, values = found["blk.0.ffn_down.weight"]
    assert kind == "BF16" and np.array_equal(
        values, source.tensor("model.layers.0.mlp.down_proj.weight").float().numpy()
    )
    assert found["blk.0.attn_q.weight"][0] == "Q8_0" and found["blk.0.ffn_up.weight"][0] == "Q4_0"


Change = Callable[[Any], Any]


def grid_of(**fields: Any) -> Change:
    """The first layer on another grid."""

    def change(contents: Any) -> Any:
        layer, coded = next(item for item in contents.layers.items() if not item[1].form.table)
        form = replace(coded.form, grid=replace(coded.grid, **fields))
        return replace(contents, layers={**contents.layers, layer: replace(coded, form=form)})

    return change


def part_of(layer: str, **fields: Any) -> Change:
    return lambda contents: replace(
        contents, layers={**contents.layers, layer: replace(contents.layers[layer], **fields)}
    )


def config_of(**fields: Any) -> Change:
    return lambda contents: replace(contents, config={**contents.config, **fields})


DOWN = "model.layers.0.mlp.down_proj"
ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED: dict[str, tuple[Change, str]] = {
    "family": (config_of(model_type="opt"), "models of type opt are not supported; these are: llama, mistral"),
    "8 bits with zero points": (grid_of(bits=8, symmetric=False), "bits: 8, group_size: -1, symmetric: true"),
    "columns": (part_of(DOWN, shape=(64, 80)), f"cannot hold {DOWN} quantized: 32 does not divide its 80"),
    "scales": (part_of(DOWN, half=False), f"scales of {DOWN} as they are: quantize.scale_dtype: float16"),
    "activation": (config_of(hidden_act="relu"), "llama.cpp computes llama with silu, not with relu"),
    "positions": (config_of(rope_parameters=ROPE), "cannot hold rope_type dynamic"),
    "tensor": (
        lambda contents: replace(contents, plain={**contents.plain, "score.weight": (2, 64)}),
        "no place for score.weight in a model of architecture llama",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CodedCheckpoint:
    torch.manual_seed(0)
    return packed(tmp_path_factory.mktemp("llama"), FAMILIES["llama"].build())


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_have_is_refused_by_name(llama, case):
    change, message = REFUSED[case]
    target.check(contents_of(llama))
    with pytest.raises(InputError) as error:
        target.check(change(contents_of(llama)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_scales_that_are_in_a_wider_dtype_may_fit(tmp_path):
    source = packed(tmp_path, FAMILIES["llama"].build(), scale_dtype="bfloat16")
    target.check(contents_of(source))
    source = packed(tmp_path / "wide", FAMILIES["llama"].build(), scale_dtype="float32")
    with pytest.raises(InputError, match="does not hold the F32 scales of"):
        target.check(contents_of(source))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_llama_cpp_computes_the_same(tmp_path, family):
    pytest.importorskip("xllamacpp")
    source = packed(tmp_path, FAMILIES[family].build(), tokenizer=family == "llama")
    found = target.verify(target.write(source, tmp_path)[0].parent, source.checkpoint.path, padded_batches(1))
    assert found["examples"] == 4
    if family == "bert":
        assert found["cosine"] > 0.999
    else:
        assert abs(found["error"] - found["expected"]) < 0.01 and found["kl"] < 0.001 and found["texts"] == 1


def test_rows_in_another_order_are_found(tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    source = packed(tmp_path, FAMILIES["llama"].build(), tokenizer=True)
    monkeypatch.setattr(target, "row_order", lambda config, name: None)
    target.write(source, tmp_path)
    with pytest.raises(RuntimeError, match="gives other next tokens than epmq"):
        target.verify(tmp_path, source.checkpoint.path, padded_batches(1))


def test_gpt2_is_packed_and_exported(tmp_path):
    """Its `Conv1D` layers store [in, out]; their codes are [out, in]."""
    source = packed(tmp_path, FAMILIES["gpt2"].build())
    assert source.codes("transformer.h.0.attn.c_attn").codes.shape == (96, 32)
    result = export_checkpoint(tmp_path / "packed", "gguf", tmp_path / "out", progress=False)
    assert result["bytes"] == (tmp_path / "out" / "model-q4_0.gguf").stat().st_size
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "out"), transformers.GPT2Config)
