"""How good a model is at each task.

Every metric takes a model, a task (which of its heads) and examples, and by keyword `batch_size` and `max_length` (see
`epmq.data.encoding.encode`) and `advance`, which is called with the number of examples done, batch by batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from epmq.data.encoding import encode, to_device, tokenizer_of
from epmq.data.examples import Examples
from epmq.errors import InputError
from epmq.models.multitask import MultiTaskModel


def _batches(
    model: MultiTaskModel,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Inputs on the model's device with their targets, else labels [batch], if any; by length, batch by batch."""
    examples, start = examples.by_length(), 0
    answers = examples.labels if examples.targets is None else examples.targets
    for batch in encode(examples, model.processor, batch_size, max_length):
        size = len(next(iter(batch.values())))
        yield to_device(batch, model.device), None if answers is None else answers[start : start + size]
        start += size
        advance(size)


@torch.no_grad()
def accuracy(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Share of examples whose best-scored class is the label.

    Raises:
        ValueError: the examples have no labels, or a label is not a class of the head.
    """
    if examples.labels is None:
        raise InputError(f"task {task}: the evaluation data has no labels")
    right = 0
    for inputs, labels in _batches(model, examples, **options):
        scores = model(task, **inputs)
        wrong = labels[(labels < 0) | (labels >= scores.shape[1])]
        if len(wrong):
            raise InputError(f"task {task}: label {wrong[0]} but the head has {scores.shape[1]} classes")
        right += int((scores.argmax(-1).cpu().numpy() == labels).sum())
    return right / len(examples)


@torch.no_grad()
def log_perplexity(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Mean negative log-likelihood of a token given those before it, in nats; its exponential is the perplexity.

    The first token of a sequence is not predicted, padding does not count. The examples are windows of tokens,
    documents or conversations.
    """
    total, count = 0.0, 0
    for inputs, _ in _batches(model, examples, **options):
        labels = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
        # One sequence at a time: the scores of a large vocabulary are not copied whole.
        for scores, next_tokens in zip(model.backbone(**inputs).logits, labels):
            total += float(torch.nn.functional.cross_entropy(scores[:-1].float(), next_tokens, reduction="sum"))
        count += int((labels != -100).sum())
    return total / max(count, 1)


@torch.no_grad()
def exact_match(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Share of examples whose greedily generated text is the target, but for space at its ends."""
    pairs = list(_written(model, examples, **options))
    return sum(text.strip() == target.strip() for text, target in pairs) / len(pairs)


@torch.no_grad()
def spearman(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Spearman's ρ between the numbers that are generated and those in the targets, −1 to 1.

    A text that is no number counts as 0, as in FusionBench's tables; where all texts are the same number there is no
    order, and ρ is 0.

    Raises:
        ValueError: a target is no number.
    """
    pairs = list(_written(model, examples, **options))
    wrong = next((target for _, target in pairs if _number(target) is None), None)
    if wrong is not None:
        raise InputError(f"task {task}: the target {wrong!r} is no number")
    return rank_correlation(*([_number(text) or 0.0 for text in texts] for texts in zip(*pairs)))


def _written(model: MultiTaskModel, examples: Examples, **options: Any) -> Iterator[tuple[str, str]]:
    """What is greedily generated for each example, and its target; texts no shorter than the longest target."""
    tokenizer = tokenizer_of(model.processor)
    longest = max(len(ids) for ids in tokenizer(text_target=examples.targets)["input_ids"])
    count = min(longest + 1, examples.longest[1] or longest + 1)  # no more than the model has positions for
    for inputs, targets in _batches(model, examples, **options):
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        tokens = model.backbone.generate(**prompt, max_new_tokens=count, do_sample=False, num_beams=1)
        yield from zip(tokenizer.batch_decode(tokens, skip_special_tokens=True), targets)


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
    **dict.fromkeys(("tokens", "causal", "chat"), (log_perplexity,)),
}


def scorer_of(examples: Examples) -> Callable[..., float]:
    """The metric that examples are scored by.

    Raises:
        ValueError: there is none for their kind, or not the one that is asked for.
    """
    if examples.kind not in METRICS:
        raise InputError(f"{examples.kind} examples cannot be scored; only calibrated on")
    metrics = {metric.__name__: metric for metric in METRICS[examples.kind]}
    scorer = metrics.get(examples.metric or next(iter(metrics)))
    if scorer is None:
        raise InputError(
            f"metric: {examples.kind} examples are scored by {', '.join(metrics)}, not by {examples.metric}"
        )
    return scorer


def metric_of(examples: Examples) -> str:
    """Name of the metric that examples are scored by; errors as in `scorer_of`."""
    return scorer_of(examples).__name__


def metrics_of(evaluation: Mapping[str, Examples]) -> dict[str, str]:
    """Task → name of the metric that its examples are scored by; errors as in `scorer_of`."""
    return {task: metric_of(examples) for task, examples in evaluation.items()}
