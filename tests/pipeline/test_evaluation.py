"""Scores: what they measure, and where they are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, perturbed, recipe_for, word_tokenizer
from families import FAMILIES
from rich.console import Console
from typer.testing import CliRunner

import epmq
from epmq.cli import app
from epmq.data.encoding import encode, pack
from epmq.data.examples import Examples
from epmq.data.readers import read_examples
from epmq.models.multitask import MultiTaskModel
from epmq.pipeline.evaluation import (
    METRICS,
    accuracy,
    exact_match,
    log_perplexity,
    metric_of,
    metrics_of,
    rank_correlation,
    scorer_of,
    spearman,
)
from epmq.pipeline.run import evaluate_experts, run
from epmq.reporting.report import summary_table


@pytest.fixture(scope="module")
def merged(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool's experts, merged and rounded to 4 bits."""
    folder = tmp_path_factory.mktemp("merged")
    run(recipe_for(pool, output=str(folder / "out"), quantize={"method": "rtn"}), progress=False, evaluate=False)
    return folder / "out"


def test_accuracy_is_the_share_of_right_answers(pool, merged):
    model = epmq.load(merged)
    texts = [f"{a} {b}" for a in ("the", "a big", "small blue tree and") for b in ("cat", "dog", "mat sat on")]
    answers = np.asarray(["xyz".index(name) for name in model.answer("one", texts)])
    assert accuracy(model, "one", Examples("text", texts, answers), batch_size=4) == 1
    assert accuracy(model, "one", Examples("text", texts, (answers + 1) % 3), batch_size=4) == 0
    half = np.where(np.arange(9) < 3, answers, (answers + 1) % 3)
    done = []
    assert accuracy(model, "one", Examples("text", texts, half), batch_size=2, advance=done.append) == 3 / 9
    assert done == [2, 2, 2, 2, 1]


def test_labels_that_do_not_fit_the_head_are_refused(merged):
    model = epmq.load(merged)
    with pytest.raises(ValueError, match="task one: the evaluation data has no labels"):
        accuracy(model, "one", Examples("text", TEXTS, None))
    for labels, wrong in (([0, 1, 3], 3), ([0, -1, 1], -1)):
        with pytest.raises(ValueError, match=f"task one: label {wrong} but the head has 3 classes"):
            accuracy(model, "one", Examples("text", TEXTS, np.asarray(labels)))


# --- perplexity --------------------------------------------------------------------------------------------------


def writer(family: str = "llama", **settings: Any) -> MultiTaskModel:
    """A language model with large enough weights for its losses to differ from token to token."""
    model = perturbed(FAMILIES[family].build(), 3, size=0.2)
    return MultiTaskModel(model, {}, word_tokenizer(**settings))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@torch.no_grad()
def test_log_perplexity_is_the_models_own_loss_on_windows(family, batch_size):
    model = writer(family)
    windows = pack(Examples("causal", TEXTS * 4), model.processor, 6, None, 0)
    ids = torch.from_numpy(windows.inputs)
    done: list[int] = []
    found = log_perplexity(model, "any", windows, batch_size, advance=done.append)
    assert found == pytest.approx(float(model.backbone(ids, labels=ids).loss), rel=1e-5)
    assert sum(done) == len(windows) and max(done) <= batch_size
    # exp of the mean of −log p, by hand.
    logp = model.backbone(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert math.exp(found) == pytest.approx(float((-logp).mean().exp()), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["chat", "causal"])
@torch.no_grad()
def test_padding_does_not_count(family, side, kind):
    model = writer(family, padding_side=side, chat_template=CHAT_TEMPLATE)
    inputs: list[Any] = [*TEXTS, "the small cat ran under the big red tree"]
    if kind == "chat":
        inputs = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a dog"}] for text in inputs]
    examples = Examples(kind, inputs)
    total, count = 0.0, 0
    for (batch,) in (encode(Examples(kind, [one]), model.processor) for one in inputs):
        ids = batch["input_ids"]
        total += float(model.backbone(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    for batch_size in (1, 2, 4):
        assert log_perplexity(model, "any", examples, batch_size) == pytest.approx(total / count, rel=1e-5)


# --- exact match -------------------------------------------------------------------------------------------------


@pytest.fixture
def translator() -> MultiTaskModel:
    """An encoder–decoder that writes known words only and comes to an end."""
    model = perturbed(FAMILIES["t5"].build(), 4, size=0.5)
    model.generation_config.eos_token_id = 2
    model.generation_config.suppress_tokens = [0, 1, 3, *range(20, 32)]
    model.generation_config.exponential_decay_length_penalty = (2, 2.0)
    return MultiTaskModel(model, {}, word_tokenizer(ends=True))


@torch.no_grad()
def test_exact_match_is_the_share_of_texts_that_are_generated(translator):
    sources = [f"{a} {b}" for a in ("the", "small blue tree and") for b in ("cat", "dog", "mat sat on")]
    written = translator.generate(sources, max_new_tokens=20)
    assert all(1 <= len(text.split()) < 15 for text in written) and len(set(written)) > 3
    padded = [f" {text}\n" for text in written]
    wrong = [text + " cat" for text in written]
    for targets, share in ((written, 1), (padded, 1), (wrong, 0), (written[:2] + wrong[2:], 1 / 3)):
        done: list[int] = []
        examples = Examples("seq2seq", sources, targets=targets)
        for batch_size in (1, 4):
            assert exact_match(translator, "any", examples, batch_size, advance=done.append) == pytest.approx(share)
        assert sum(done) == 2 * len(sources)


@pytest.mark.parametrize(
    ("one", "other", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # the example of scipy.stats.spearmanr
        ([1, 1, 2, 2, 3], [2.5, 0.5, 0.5, 4.0, 3.0], 4.5 / math.sqrt(9 * 9.5)),  # by hand, from the mean ranks
        ([3, 3, 3], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlations(one, other, rho):
    assert rank_correlation(one, other) == pytest.approx(rho)
    assert rank_correlation(np.exp(one), other) == pytest.approx(rho)


def test_spearman_compares_the_numbers_that_are_written(translator, monkeypatch):
    from epmq.pipeline import evaluation as evaluate

    texts = iter(["3.0", "nonsense", "5", "inf", "4.5"])
    monkeypatch.setattr(evaluate, "_written", lambda *args: zip(texts, ["1.0", "2.0", "3.0", "0.5", "2.5"]))
    found = spearman(translator, "any", Examples("seq2seq", [], targets=[]))
    assert found == pytest.approx(rank_correlation([3, 0, 5, 0, 4.5], [1, 2, 3, 0.5, 2.5]))
    monkeypatch.undo()
    sources = ["the cat", "small blue tree and dog"]
    assert spearman(translator, "any", Examples("seq2seq", sources, targets=["1.0", "2.0"])) == 0.0
    with pytest.raises(ValueError, match="task any: the target 'yes' is no number"):
        spearman(translator, "any", Examples("seq2seq", sources, targets=["1.0", "yes"]))


def test_another_metric_may_be_asked_for():
    rated = Examples("seq2seq", ["a", "b"], targets=["1", "2"], metric="spearman")
    assert scorer_of(rated) is spearman and metric_of(rated.take(np.array([0]))) == "spearman"
    with pytest.raises(ValueError, match="metric: text examples are scored by accuracy, not by spearman"):
        metric_of(Examples("text", [], metric="spearman"))


# --- reports -----------------------------------------------------------------------------------------------------


def test_every_kind_has_its_metric_or_says_that_it_has_none():
    names = {kind: metric_of(Examples(kind, [])) for kind in METRICS}
    assert names["text"] == names["image"] == "accuracy" and names["seq2seq"] == "exact_match"
    assert names["tokens"] == names["causal"] == names["chat"] == "log_perplexity"
    rated = Examples("seq2seq", ["x"], targets=["1"], metric="spearman")
    assert metrics_of({"a": Examples("tokens", []), "b": rated}) == {"a": "log_perplexity", "b": "spearman"}
    for kind in ("image_text", "batches"):
        with pytest.raises(ValueError, match=f"{kind} examples cannot be scored; only calibrated on"):
            metric_of(Examples(kind, []))


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
