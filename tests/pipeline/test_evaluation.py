"""Scores of checkpoints and of experts, and where they are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, perturbed, recipe_for, word_tokenizer
from families import FAMILIES
from rich.console import Console
from typer.testing import CliRunner

import epmq
from epmq.cli import app
from epmq.data.encoding import pack
from epmq.data.readers import read_examples
from epmq.pipeline.evaluation import evaluate_checkpoint, evaluate_experts
from epmq.pipeline.run import merge, run
from epmq.reporting.report import summary_table


def test_experts_are_measured_on_their_own_tasks(pool, tmp_path):
    recipe = recipe_for(pool)
    scores, base = (evaluate_experts(recipe, base=base, progress=False)["scores"] for base in (False, True))
    for task in ("one", "two"):
        # An expert alone, merged with itself, is itself.
        alone = {
            **recipe,
            "experts": [e for e in recipe["experts"] if e["name"] == task],
            "merge": {"method": "average"},
        }
        report = merge({**alone, "output": str(tmp_path / task)}, progress=False, evaluate=True)
        assert report["scores"] == {task: scores[task]}
        report = run(
            {**alone, "merge": {"scaling": 0.0}, "quantize": {"method": "none"}, "output": str(tmp_path / f"{task}0")},
            progress=False,
        )
        assert report["scores"] == {task: base[task]}


def test_nothing_to_evaluate_on(pool):
    recipe = recipe_for(pool)
    for expert in recipe["experts"]:
        del expert["evaluation"]
    for measure in (lambda: evaluate_experts(recipe), lambda: evaluate_checkpoint(pool / "base", recipe)):
        with pytest.raises(ValueError, match="no expert has evaluation data"):
            measure()


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of two language models, scored on running text and on conversations."""
    folder = tmp_path_factory.mktemp("writers")
    base = FAMILIES["llama"].build()
    base.save_pretrained(folder / "base")
    word_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "base")
    rows = {"one": [{"text": text} for text in TEXTS * 6]}
    rows["two"] = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS * 3]
    experts = []
    for seed, (task, content) in enumerate(rows.items(), start=1):
        perturbed(type(base).from_pretrained(folder / "base"), seed, 0.03).save_pretrained(folder / task)
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        data = {"path": str(path)}
        experts.append({"name": task, "model": str(folder / task), "calibration": data, "evaluation": data})
    recipe = {"base": str(folder / "base"), "experts": experts, "max_length": 8, "output": str(folder / "out")}
    run(recipe, progress=False)
    return recipe


@torch.no_grad()
def test_perplexities_are_reported_and_shown(writers, tmp_path):
    out = Path(writers["output"])
    report, model = json.loads((out / "report.json").read_text()), epmq.load(out)
    assert report["metric"] == "log_perplexity" and model.tasks == []
    assert report["mean_score"] == pytest.approx(sum(report["scores"].values()) / 2)
    texts = read_examples(writers["experts"][0]["evaluation"]["path"], use="causal")
    windows = pack(texts, model.processor, 8, None, 0)
    ids = torch.from_numpy(windows.inputs)
    assert report["scores"]["one"] == pytest.approx(float(model.backbone(ids, labels=ids).loss), rel=1e-5)

    shown = [f"{math.exp(value):.2f}" for value in (*report["scores"].values(), report["mean_score"])]
    console = Console(record=True, width=120, file=(tmp_path / "null").open("w"))
    console.print(summary_table(report))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(writers))
    printed = CliRunner().invoke(app, ["eval", str(out), str(recipe), "--quiet", "--experts"])
    assert printed.exit_code == 0, printed.output
    for text in (console.export_text(), printed.output, (out / "README.md").read_text()):
        assert "perplexity" in text and "accuracy" not in text
        assert all(value in text for value in (shown if "mean" in text else shown[:2]))
    experts = evaluate_experts(writers, progress=False)
    assert all(f"{math.exp(value):.2f}" in printed.output for value in experts["scores"].values())
    as_json = CliRunner().invoke(app, ["eval", str(out), str(recipe), "--quiet", "--json"])
    assert json.loads(as_json.stdout)[str(out)]["scores"] == report["scores"]
