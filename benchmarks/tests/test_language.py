"""Experts of the language suites are trained and measured, on a base of a few words."""

import json
from pathlib import Path

import pytest
from vocabularies import write_base

from benchmarks.suites.language import train_expert


@pytest.mark.parametrize("kind, metric", [("causal", "log_perplexity"), ("seq2seq", "exact_match")])
def test_an_expert_is_written_with_what_it_scores(tmp_path: Path, kind: str, metric: str) -> None:
    base, out = tmp_path / "base", tmp_path / "expert"
    write_base(tmp_path, family="t5" if kind == "seq2seq" else "llama")
    out.mkdir()
    splits = {name: [{"text": "a b", "target": "c"}] * 4 for name in ("train", "validation", "test")}
    train_expert(base, out, splits, kind, 8, epochs=1, learning_rate=1e-3, batch_size=2)
    record = json.loads((out / "training.json").read_text())
    assert record["metric"] == metric and (out / "model.safetensors").is_file()
    assert isinstance(record["base_test"], float) and isinstance(record["test"], float)
