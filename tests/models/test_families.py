"""Every supported family through the whole pipeline: merge, expert-guided 4 bits, export, reload."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import perturbed
from families import FAMILIES

import epmq
from epmq.calibration.sequential import Batch, SequentialCalibrator
from epmq.models.blocks import LINEAR, find_stacks, linears
from epmq.models.loading import load_model
from epmq.pipeline.run import run

# Ends of the names of tables of tokens.
TABLES = ("word_embeddings", "embed_tokens", "shared", "wte", "token_embedding")
QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def recipe_of(family: str, folder: Path, **fields: Any) -> dict[str, Any]:
    """Base and two experts of a family on disk."""
    base = FAMILIES[family].build()
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        perturbed(copy.deepcopy(base), seed).save_pretrained(folder / name)
    experts = [{"name": name, "model": str(folder / name)} for name in ("one", "two")]
    return {"base": str(folder / "base"), "experts": experts, **fields}


def batches_of(family: str) -> dict[str, Any]:
    batches = FAMILIES[family].batches()
    return {"one": batches, "two": batches[:1]}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chained_blocks_are_the_models_own_forward(family):
    spec = FAMILIES[family]
    model, batches = spec.build(), spec.batches()
    assert {stack.name: len(stack.blocks) for stack in find_stacks(model)} == spec.stacks
    expected = [tensors_of(model(**batch)) for batch in batches]

    calibrator = SequentialCalibrator(model, [Batch("", index, batch) for index, batch in enumerate(batches)])
    names = []
    for step in calibrator:
        names.append(step.name)
        step.finish()
    assert sorted(names) == sorted(f"{name}.{i}" for name, count in spec.stacks.items() for i in range(count))

    # The stored outputs of the last blocks, put through what follows them, must be the model's own output.
    for i, batch in enumerate(batches):
        for stack in calibrator.stacks:
            for block in stack.blocks:
                block.forward = lambda *args, stack=stack, i=i, **kwargs: stack.outputs[i]
        found = tensors_of(model(**batch))
        assert found.keys() == expected[i].keys() and found
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[i][name]), name
        for stack in calibrator.stacks:
            for block in stack.blocks:
                del block.forward


def real_tokens(batches: list[dict[str, torch.Tensor]], stack: str, crossing: bool) -> int:
    """Tokens that a layer must be calibrated on."""
    total = 0
    for batch in batches:
        if "vision" in stack or "input_ids" not in batch:
            total += len(batch["pixel_values"]) * 5
        elif "decoder" in stack and not crossing:
            total += int(batch["decoder_attention_mask"].sum())
        else:
            total += int(batch["attention_mask"].sum())
    return total


def check_outside(found: dict[str, Any], model: Any, calibration: dict[str, Any]) -> None:
    """Tables are rounded; other matrices outside the blocks are calibrated, a generator's output layer on tokens."""
    blocks = tuple(f"{stack.name}." for stack in find_stacks(model))
    tables = [one for name, one in model.named_modules() if name.endswith(TABLES)]
    output, names = model.get_output_embeddings(), dict[int, str]()
    for name, module in model.named_modules():
        if module in tables or (isinstance(module, LINEAR) and not name.startswith(blocks)):
            names.setdefault(id(module.weight), name)
    assert set(found) == set(names.values())
    for name, layer in found.items():
        module = model.get_submodule(name)
        if module in tables:
            assert (layer["bits"], layer["loss"], layer["tokens"]) == (8, None, 0), name
            continue
        per_task = [
            real_tokens(b, "decoder", False) if "decoder_input_ids" in b[0] else real_tokens(b, "", False)
            for b in calibration.values()
        ]
        sequences = sum(len(next(iter(batch.values()))) for b in calibration.values() for batch in b)
        tokens = sum(per_task) if module is output else sequences
        assert layer["tokens"] == tokens and (layer["loss"] is not None) == (tokens > 0), name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_quantize_export_and_reload(family, stream, tmp_path):
    form = "dequantized" if family == "gpt2" else "pack-quantized"
    recipe = recipe_of(family, tmp_path, format=form, output=str(tmp_path / "out"))
    recipe["quantize"] = {**recipe.get("quantize", {}), "expert_stream": stream}
    calibration = batches_of(family)
    report = run(recipe, calibration=calibration, **QUIET)
    without = any("no layer adds to the residual stream" in note for note in report["notes"])
    assert without == (stream and family == "gemma3")

    # Every linear layer of every block was calibrated, on every real token and on no padding.
    model = FAMILIES[family].build()
    wanted = {
        f"{stack.block_name(i)}.{name}": stack.name
        for stack in find_stacks(model)
        for i, block in enumerate(stack.blocks)
        for name, _ in linears(block)
    }
    layers = {layer["name"]: layer for layer in report["layers"]}
    check_outside({name: layer for name, layer in layers.items() if name not in wanted}, model, calibration)
    for name, stack in wanted.items():
        layer = layers[name]
        crossing = ("EncDecAttention" in name or "encoder_attn" in name) and name.endswith(
            (".k", ".v", "k_proj", "v_proj")
        )
        assert layer["tokens"] == sum(real_tokens(b, stack, crossing) for b in calibration.values()), name
        assert layer["loss"] is not None and layer["loss"] >= 0

    # Packed and plain files, read back, are the same model; the plain one needs nothing but transformers.
    run({**recipe, "format": "dequantized", "output": str(tmp_path / "plain")}, calibration=calibration, **QUIET)
    plain = load_model(tmp_path / "plain", {"architectures": [type(model).__name__]})
    reference = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "plain").eval()
    packed, moved = epmq.load(tmp_path / "out").backbone, False
    direct = packed
    if not stream and not any("AutoModel.from_pretrained cannot open" in note for note in report["notes"]):
        direct = type(reference).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for batch in calibration["one"]:
            found = tensors_of(packed(**batch))
            assert found
            for name, tensor in tensors_of(reference(**batch)).items():
                assert torch.equal(found[name], tensor), name
                assert direct is packed or torch.equal(tensors_of(direct(**batch))[name], tensor), name
                assert torch.equal(tensors_of(plain(**batch))[name], tensor), name
                moved = moved or not torch.equal(tensor, tensors_of(model(**batch))[name])
    assert moved
