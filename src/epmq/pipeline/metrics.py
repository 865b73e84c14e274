"""How good a model is at each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from epmq.data.encoding import encode, to_device, tokenizer_of
from epmq.data.examples import Examples
from epmq.errors import InputError
from epmq.models.multitask import MultiTaskModel

Advance = Callable[[int], Any]


def _silent(count: int) -> None:
    """Tells nobody how many examples are done."""


@torch.no_grad()
def accuracy(
    model: MultiTaskModel,
    task: str,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Advance = _silent,
) -> float:
    """Share of examples whose best-scored class is the label.

    Args:
        model: backbone and heads.
        task: which head.
        examples: with labels.
        batch_size, max_length: see `epmq.data.encoding.encode`.
        advance: called with the number of examples done, batch by batch.

    Raises:
        ValueError: the examples have no labels, or a label is not a class of the head.
    """
    if examples.labels is None:
        raise InputError(f"task {task}: the evaluation data has no labels")
    examples = examples.by_length()
    assert examples.labels is not None
    right, start = 0, 0
    for batch in encode(examples, model.processor, batch_size, max_length):
        scores = model(task, **to_device(batch, model.device))
        labels = examples.labels[start : start + len(scores)]
        wrong = labels[(labels < 0) | (labels >= scores.shape[1])]
        if len(wrong):
            raise InputError(f"task {task}: label {wrong[0]} but the head has {scores.shape[1]} classes")
        right += int((scores.argmax(-1).cpu().numpy() == labels).sum())
        start += len(scores)
        advance(len(scores))
    return right / len(examples)


@torch.no_grad()
def log_perplexity(
    model: MultiTaskModel,
    task: str,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Advance = _silent,
) -> float:
    """Mean negative log-likelihood of a token given those before it, in nats; its exponential is the perplexity.

    The first token of a sequence is not predicted, padding does not count. Arguments as in `accuracy`; the examples
    are windows of tokens, documents or conversations.
    """
    total, count, examples = 0.0, 0, examples.by_length()
    for batch in encode(examples, model.processor, batch_size, max_length):
        batch = to_device(batch, model.device)
        labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        # One sequence at a time: the scores of a large vocabulary are not copied whole.
        for scores, wanted in zip(model.backbone(**batch).logits, labels):
            total += float(torch.nn.functional.cross_entropy(scores[:-1].float(), wanted, reduction="sum"))
        count += int((labels != -100).sum())
        advance(len(labels))
    return total / max(count, 1)


@torch.no_grad()
def exact_match(
    model: MultiTaskModel,
    task: str,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Advance = _silent,
) -> float:
    """Share of examples whose greedily generated text is the target, but for space at its ends.

    Arguments as in `accuracy`; the examples have targets.
    """
    pairs = list(_written(model, examples, batch_size, max_length, advance))
    return sum(text.strip() == target.strip() for text, target in pairs) / len(pairs)


@torch.no_grad()
def spearman(
    model: MultiTaskModel,
    task: str,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Advance = _silent,
) -> float:
    """Spearman's ρ between the numbers that are generated and those in the targets, −1 to 1.

    A text that is no number counts as 0, as in FusionBench's tables; where all texts are the same number there is no
    order, and ρ is 0. Arguments as in `accuracy`; the examples have targets.

    Raises:
        ValueError: a target is no number.
    """
    pairs = list(_written(model, examples, batch_size, max_length, advance))
    wrong = next((target for _, target in pairs if _number(target) is None), None)
    if wrong is not None:
        raise InputError(f"task {task}: the target {wrong!r} is no number")
    return rank_correlation(*([_number(text) or 0.0 for text in texts] for texts in zip(*pairs)))


def _written(
    model: MultiTaskModel, examples: Examples, batch_size: int, max_length: int | None, advance: Advance
) -> Iterator[tuple[str, str]]:
    """What is greedily generated for each example, and its target; texts no shorter than the longest target."""
    examples, start = examples.by_length(), 0
    assert examples.targets is not None
    tokenizer = tokenizer_of(model.processor)
    longest = max(len(ids) for ids in tokenizer(text_target=examples.targets)["input_ids"])
    for batch in encode(examples, model.processor, batch_size, max_length):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        found = model.backbone.generate(**inputs, max_new_tokens=longest + 1, do_sample=False, num_beams=1)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        yield from zip(texts, examples.targets[start : start + len(texts)])
        start += len(texts)
        advance(len(texts))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of the ranks, equal values sharing the mean of theirs; 0 where all are equal."""
    ranks = []
    for values in (one, other):
        _, index, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[index]
        ranks.append(rank - rank.mean())
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / size if size else 0.0


# How each kind of examples may be scored; the first is what is taken where nothing else is asked for.
METRICS: dict[str, tuple[Callable[..., float], ...]] = {
    "text": (accuracy,),
    "image": (accuracy,),
    "seq2seq": (exact_match, spearman),
    "tokens": (log_perplexity,),
    "causal": (log_perplexity,),
    "chat": (log_perplexity,),
}


def scorer_of(examples: Examples) -> Callable[..., float]:
    """The metric that examples are scored by.

    Raises:
        ValueError: there is none for their kind, or not the one that is asked for.
    """
    if examples.kind not in METRICS:
        raise InputError(f"{examples.kind} examples cannot be scored; only calibrated on")
    known = METRICS[examples.kind]
    found = next((metric for metric in known if examples.metric in (None, metric.__name__)), None)
    if found is None:
        names = ", ".join(metric.__name__ for metric in known)
        raise InputError(f"metric: {examples.kind} examples are scored by {names}, not by {examples.metric}")
    return found


def metric_of(examples: Examples) -> str:
    """Name of the metric that examples are scored by; errors as in `scorer_of`."""
    return scorer_of(examples).__name__


def metrics_of(evaluation: Mapping[str, Examples]) -> dict[str, str]:
    """Task → name of the metric that its examples are scored by; errors as in `scorer_of`."""
    return {task: metric_of(examples) for task, examples in evaluation.items()}
