"""The report in numbers: notes on layers, losses of blocks, the model card."""

import pytest
import torch
from conftest import recipe_for

from epmq.models.checkpoint import Checkpoint, byte_size
from epmq.pipeline.run import run
from epmq.quantize_settings import quantize_settings
from epmq.reporting.report import (
    FLOAT16_MAX,
    block_losses,
    grid_text,
    layer_grid,
    layer_notes,
    model_card,
    stored_by_depth,
    summary_table,
)


def test_losses_are_summed_by_block(pool, tmp_path):
    report = run(recipe_for(pool, output=str(tmp_path / "out")), progress=False)
    blocks = block_losses(report["layers"])
    assert [name for name, *_ in blocks] == ["encoder.layer.0", "encoder.layer.1"]  # tables have no loss
    assert sum(loss for *_, loss in blocks) == pytest.approx(report["loss"])
    tensors = Checkpoint(tmp_path / "out")
    assert report["bytes"] == sum(byte_size(tensors.spec(name)) for name in tensors.names)
    assert report["bits_per_weight"] == pytest.approx(8 * report["bytes"] / report["parameters"])
    size = f"{report['bytes'] / 1e6:.1f} MB, {report['bits_per_weight']:.2f} bits a weight"
    assert size in list(summary_table(report).columns[1].cells) and size in model_card(report)
    for field in ("parameters", "bits_per_weight"):
        del report[field]  # as in reports of older versions
    assert f"{report['bytes'] / 1e6:.1f} MB" in list(summary_table(report).columns[1].cells)


def test_what_a_layer_has_lost_is_none_where_nothing_was_measured():
    layers = [{"name": f"encoder.layer.0.{name}", "loss": 1.5, "merge_loss": None} for name in ("query", "key")]
    layers.append({"name": "lm_head.proj", "loss": None, "merge_loss": 2.0})
    layers.append({"name": "output", "loss": 1.0, "merge_loss": 0.0})
    layers.append({"name": "embeddings.words", "loss": None, "merge_loss": None})
    assert block_losses(layers) == [("encoder.layer.0", 0.0, 3.0), ("lm_head", 2.0, 0.0), ("output", 0.0, 1.0)]


def test_the_grid_of_a_recipe_in_words():
    grid = {"bits": 4, "group_size": 64, "symmetric": False}
    assert grid_text(grid) == "4 bits, g64, asymmetric" and grid_text(grid | {"bits": 16}) == "unrounded targets"
    assert grid_text(grid | {"size": 40}) == grid_text(grid | {"budget": 4.5}) == "bits chosen layer by layer"


def test_storage_by_depth():
    grid = {"group_size": -1, "symmetric": True}
    layers = [{"name": f"layers.{block}.up", "bits": bits, **grid} for block, bits in enumerate((4, 8))]
    layers += [{"name": "layers.1.down", "bits": 16, **grid}, {"name": "words", "bits": 8, **grid}]
    assert stored_by_depth({"layers": [*layers, {"name": "layers.0.old"}]}) == {
        "up": {1: (4, "4 bits, a row"), 2: (8, "8 bits, a row")},
        "down": {2: (16, "not rounded")},
    }
    assert layer_grid({"name": "layers.0.old"}, {"bits": 3, "group_size": 64, "symmetric": False}) == (
        "3 bits, g64, asymmetric"
    )


def test_notes_on_layers():
    assert torch.finfo(torch.float16).max == FLOAT16_MAX
    layer = {"name": "a.query", "group": "query", "strength": None, "damping": 0.01, "rounded": 0, "largest": 1.0}
    settings = quantize_settings(method="gptq", damping=0.01)
    assert layer_notes([layer], settings.guidance()) == []
    layer |= {"damping": 0.1, "rounded": 2, "largest": 7e4}
    assert layer_notes([layer, layer | {"name": "a.key", "damping": 0.01, "rounded": 0}], settings.guidance()) == [
        "a.query: damping raised from 0.01 to 0.1 to factor its Hessian",
        "a.query: 2 rows are rounded to nearest, which loses less there",
        "a.query: inputs reach 7e+04, more than float16 holds: load the checkpoint with dtype float32 or bfloat16",
    ]


def test_the_model_card_says_what_was_made():
    experts = [{"name": name, "model": f"hub/{name}"} for name in ("one", "two")]
    quantize = {"method": "gptq", "bits": 4, "group_size": 32}
    recipe = {"base": "hub/base", "experts": experts, "merge": {"method": "ties"}, "quantize": quantize}
    report = {"recipe": recipe, "versions": {"epmq": "1.2"}, "metric": "accuracy", "scores": {"one": 0.5}}
    text = model_card(report | {"mean_score": 0.5})
    assert text.startswith(
        "---\nlibrary_name: transformers\ntags:\n- epmq\n- merge\n- compressed-tensors\n---\n\n# 2 ex"
    )
    assert "merged with `ties` and quantized with `gptq` to 4 bits, one scale a group of 32 by epmq 1.2.\n\n" in text
    assert "| task | expert | accuracy |\n|---|---|---|\n| one | `hub/one` | 50.0 % |\n" in text
    assert "| two | `hub/two` | not evaluated |\n\n```python\n" in text
    assert text.endswith("```\n\nHow it was made, layer by layer: `report.json`.\n")
