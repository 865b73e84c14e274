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
from families import FAMILIES, decoder
from packed_models import byte_pairs, packed

from epmq.errors import InputError
from epmq.export import gguf as target
from epmq.export.gguf_models import complete, row_order
from epmq.models.codes import CodedCheckpoint
from epmq.models.heads import Head, save_head
from epmq.pipeline.exporting import contents_of, export_checkpoint

gguf = pytest.importorskip("gguf")


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


def test_settings_and_tokens_are_in_the_file(tmp_path):
    source = packed(tmp_path, FAMILIES["llama"].build(), byte_pairs())
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


def test_gpt2_is_packed_and_exported(tmp_path):
    """Its `Conv1D` layers store [in, out]; their codes are [out, in]."""
    source = packed(tmp_path, FAMILIES["gpt2"].build())
    assert source.codes("transformer.h.0.attn.c_attn").codes.shape == (96, 32)
    result = export_checkpoint(tmp_path / "packed", "gguf", tmp_path / "out", progress=False)
    assert result["bytes"] == (tmp_path / "out" / "model-q4_0.gguf").stat().st_size
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "out"), transformers.GPT2Config)


def test_the_same_file_may_be_in_float32(tmp_path):
    source = packed(tmp_path, FAMILIES["smollm2"].build())
    file = target.write_file(source, tmp_path, plain=True)
    found = tensors_of(file)
    assert file.name == "model-f32.gguf" and {kind for kind, _ in found.values()} == {"F32"}
    assert np.array_equal(found["token_embd.weight"][1], source.tensor("model.embed_tokens.weight").float().numpy())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_pools_as_all_its_heads_do(tmp_path, pooling):
    assert target.pooling_of(tmp_path) is None
    (tmp_path / "heads").mkdir()
    save_head(Head(torch.ones(2, 4), torch.ones(2), pooling), tmp_path / "heads" / "one.safetensors")
    assert target.pooling_of(tmp_path) == pooling
    save_head(Head(torch.ones(2, 4), torch.ones(2), "cls_mean"), tmp_path / "heads" / "two.safetensors")
    assert target.pooling_of(tmp_path) is None
