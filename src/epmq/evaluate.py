"""How good a model is at each task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from epmq.batches import encode, to_device, tokenizer_of
from epmq.data import Examples
from epmq.multitask import MultiTaskModel

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
        batch_size, max_length: see `epmq.batches.encode`.
        advance: called with the number of examples done, batch by batch.

    Raises:
        ValueError: the examples have no labels, or a label is not a class of the head.
    """
    if examples.labels is None:
        raise ValueError(f"task {task}: the evaluation data has no labels")
    examples = examples.by_length()
    assert examples.labels is not None
    right, start = 0, 0
    for batch in encode(examples, model.processor, batch_size, max_length):
        scores = model(task, **to_device(batch, model.device))
        labels = examples.labels[start : start + len(scores)]
        wrong = labels[(labels < 0) | (labels >= scores.shape[1])]
        if len(wrong):
            raise ValueError(f"task {task}: label {wrong[0]} but the head has {scores.shape[1]} classes")
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
    examples, right, start = examples.by_length(), 0, 0
    assert examples.targets is not None
    tokenizer = tokenizer_of(model.processor)
    longest = max(len(ids) for ids in tokenizer(text_target=examples.targets)["input_ids"])
    for batch in encode(examples, model.processor, batch_size, max_length):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        found = model.backbone.generate(**inputs, max_new_tokens=longest + 1, do_sample=False, num_beams=1)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        targets = examples.targets[start : start + len(texts)]
        right += sum(text.strip() == target.strip() for text, target in zip(texts, targets))
        start += len(texts)
        advance(len(texts))
    return right / len(examples)


# How each kind of examples is scored.
METRICS: dict[str, Callable[..., float]] = {
    "text": accuracy,
    "image": accuracy,
    "seq2seq": exact_match,
    "tokens": log_perplexity,
    "causal": log_perplexity,
    "chat": log_perplexity,
}


def metric_of(examples: Examples) -> str:
    """Name of the metric that a kind of examples is scored by.

    Raises:
        ValueError: there is none.
    """
    if examples.kind not in METRICS:
        raise ValueError(f"{examples.kind} examples cannot be scored; only calibrated on")
    return METRICS[examples.kind].__name__


def show_score(metric: str, value: float) -> str:
    """A score for people: shares in percent, log-perplexities as perplexities."""
    return f"{math.exp(value):.2f}" if metric == "log_perplexity" else f"{100 * value:.1f} %"


def gap_recovered(method: float, gptq: float, experts: float) -> float | None:
    """(method − GPTQ on the merged model) / (experts − GPTQ on the merged model); None where there is no gap."""
    return None if experts == gptq else (method - gptq) / (experts - gptq)
