"""What scores measure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, perturbed, recipe_for, word_tokenizer
from families import FAMILIES

import epmq
from epmq.data.encoding import encode, pack
from epmq.data.examples import Examples
from epmq.models.multitask import MultiTaskModel
from epmq.pipeline import metrics
from epmq.pipeline.metrics import (
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
from epmq.pipeline.run import run


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
    found = log_perplexity(model, "any", windows, batch_size=batch_size, advance=done.append)
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
        assert log_perplexity(model, "any", examples, batch_size=batch_size) == pytest.approx(total / count, rel=1e-5)


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
            options = {"batch_size": batch_size, "advance": done.append}
            assert exact_match(translator, "any", examples, **options) == pytest.approx(share)
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
    texts = iter(["3.0", "nonsense", "5", "inf", "4.5"])
    monkeypatch.setattr(metrics, "_written", lambda *args: zip(texts, ["1.0", "2.0", "3.0", "0.5", "2.5"]))
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


def test_every_kind_has_its_metric_or_says_that_it_has_none():
    names = {kind: metric_of(Examples(kind, [])) for kind in METRICS}
    assert names["text"] == names["image"] == "accuracy" and names["seq2seq"] == "exact_match"
    assert names["tokens"] == names["causal"] == names["chat"] == "log_perplexity"
    rated = Examples("seq2seq", ["x"], targets=["1"], metric="spearman")
    assert metrics_of({"a": Examples("tokens", []), "b": rated}) == {"a": "log_perplexity", "b": "spearman"}
    for kind in ("image_text", "batches"):
        with pytest.raises(ValueError, match=f"{kind} examples cannot be scored; only calibrated on"):
            metric_of(Examples(kind, []))
