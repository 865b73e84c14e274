"""What lies beside a language model; and models of both through a whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
import torch

import epmq
from epmq.models.blocks import block_linears
from epmq.models.towers import beside_language
from epmq.pipeline.run import run
from tests.kit.architectures import ARCHITECTURES
from tests.kit.identity import save_pair


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llava", {"model.vision_tower", "model.multi_modal_projector"}),
        ("qwen2vl", {"model.visual"}),
        ("gemma3_vision", {"model.vision_tower"}),  # the projector is no linear layer
        ("clip", set()),
        ("whisper", set()),
        ("llama", set()),
    ],
)
def test_towers_and_projectors_are_found_by_what_transformers_calls_the_decoder(name, parts):
    found = beside_language(ARCHITECTURES[name].build())
    assert set(found.values()) == parts
    assert all(layer.startswith(f"{part}.") for layer, part in found.items())
    assert not any("language_model" in layer or layer == "lm_head" for layer in found)


def padded(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of which the last text has padding, where it has a mask."""
    if "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"].clone()
    mask[-1, -3:] = 0
    return {**batch, "attention_mask": mask}


@torch.no_grad()
def rows_reaching(model: Any, batch: dict[str, Any], layers: Collection[str]) -> dict[str, int]:
    """How many rows of inputs linear layers are called on, without padding; all of them see every token once."""
    seen, padding = Counter[str](), int((batch.get("attention_mask", torch.ones(1)) == 0).sum())

    def note(name: str, module: Any, args: Any) -> None:
        seen[name] += args[0].shape[:-1].numel() - (padding if "language_model" in name or "text_model" in name else 0)

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(partial(note, name))
    model(**batch)
    return dict(seen)


@pytest.mark.parametrize("name", ["llava", "qwen2vl", "qwen25vl", "gemma3_vision", "idefics3", "smolvlm", "whisper"])
def test_language_models_beside_towers_are_calibrated_on_what_reaches_them_and_reloaded(name, tmp_path):
    """Text and pictures alike, and no padding; transformers alone opens what was packed."""
    architecture = ARCHITECTURES[name]
    save_pair(architecture, tmp_path)
    batch = padded(architecture.batches()[0])
    recipe = {"base": str(tmp_path / "base"), "output": str(tmp_path / "out"), "quantize": {"method": "expert_guided"}}
    experts = [{"name": "one", "model": str(tmp_path / "expert")}]
    report = run({**recipe, "experts": experts}, calibration={"one": [batch]}, progress=False, evaluate=False)
    model = architecture.build()
    found = {layer["name"]: layer["tokens"] for layer in report["layers"] if layer["loss"] is not None}
    blocks = {layer for layer, _ in block_linears(model)} - beside_language(model).keys()
    assert blocks <= found.keys() and not found.keys() & beside_language(model).keys()
    assert {layer: found[layer] for layer in blocks} == rows_reaching(model, batch, blocks)
    with torch.no_grad():
        scores = epmq.load(tmp_path / "out").backbone(**batch).logits
        direct = type(model).from_pretrained(tmp_path / "out").eval()
        assert torch.equal(direct(**batch).logits, scores) and torch.isfinite(scores).all()
