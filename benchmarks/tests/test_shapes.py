import time
from dataclasses import replace

import pytest
import torch

from benchmarks.speed import shapes
from benchmarks.tables.speed import shapes_table
from epmq.models.checkpoint import Checkpoint

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def tiny(monkeypatch):
    config = {**TINY, "vocab_size": 64, "tie_word_embeddings": True}
    shape = replace(shapes.SHAPES["llama-1b"], config=config, layers=2, experts=2, samples=3, tokens=5)
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": shape})
    return shape


def test_a_shape_goes_through_the_whole_pipeline(tiny, tmp_path):
    shapes.write_models(tiny, tmp_path)
    written = Checkpoint(tmp_path / "base")
    assert written.dtype("model.norm.weight") == torch.bfloat16 and "lm_head.weight" not in written
    row = shapes.measure("tiny", tmp_path)
    assert row["parameters"] == sum(written.tensor(name).numel() for name in written.names)
    assert row["experts"] == 2 and row["tokens"] == 15 and row["layers"] == 15
    assert {"check", "merge", "forward", "moments", "targets", "solve", "write"} <= row["seconds"].keys()
    assert row["input_bytes"] > 3 * 2 * row["parameters"] and row["output_bytes"] < 2 * row["parameters"]
    assert shapes_table([row]).splitlines()[2].startswith("| tiny | 0 M | 2 | 3, 15 | 0.0 | 0.00 | ")


def test_an_output_that_lacks_something_is_named(tiny, tmp_path):
    shapes.write_models(tiny, tmp_path)
    layers = [name.removesuffix(".weight") for name in Checkpoint(tmp_path / "base").names if "proj" in name]
    with pytest.raises(ValueError, match="_proj"):
        shapes.check_output(tiny, tmp_path / "base", dict.fromkeys(layers, 4))
    with pytest.raises(ValueError, match="not in the report"):
        shapes.check_output(tiny, tmp_path / "base", dict.fromkeys(layers[1:], 4))


def test_an_inner_phase_stops_the_outer_clock():
    clock = shapes.Clock()
    with clock.phase("outer"), clock.phase("inner"):
        time.sleep(0.2)
    seconds = clock.read()
    assert seconds["inner"] >= 0.2 and seconds["outer"] < 0.1
