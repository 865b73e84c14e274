"""How good a model is at each task.

Every metric takes a model, a task (which of its heads) and examples, and by keyword `batch_size` and `max_length` (see
`epmq.data.encoding.encode`) and `advance`, which is called with the number of examples done, batch by batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from epmq.data.encoding import encode, text_length, to_device
from epmq.data.examples import Examples
from epmq.data.labels import IGNORED
from epmq.data.pictures import placeholder_ids
from epmq.data.processors import tokenizer_of
from epmq.errors import InputError
from epmq.models import predictions
from epmq.models.multitask import MultiTaskModel, best_choices
from epmq.pipeline.scoring import OUTSIDE, correlation, entity_f1, f1, rank_correlation, span_f1, span_match


def _batches(
    model: MultiTaskModel,
    examples: Examples,
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Inputs on the model's device with their targets, else labels [batch], if any; by length, batch by batch."""
    examples, start = examples.by_length(), 0
    right = examples.labels if examples.targets is None else examples.targets
    for batch in encode(examples, model.processor, batch_size, max_length):
        size = len(next(iter(batch.values())))
        yield to_device(batch, model.device), None if right is None else right[start : start + size]
        start += size
        advance(1 if examples.kind == "batches" else size)


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
    return right / len(examples.labels)


@torch.no_grad()
def log_perplexity(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Mean negative log-likelihood of a token given those before it, in nats; its exponential is the perplexity.

    The first token of a sequence is not predicted; padding, and what stands for a picture, does not count. The examples
    are windows of tokens, documents or conversations.
    """
    total, count, shown = 0.0, 0, torch.tensor(placeholder_ids(model.processor), device=model.device)
    for inputs, _ in _batches(model, examples, **options):
        labels = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
        labels = labels.masked_fill(torch.isin(labels, shown), -100) if len(shown) else labels
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


@torch.no_grad()
def _numbers(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> list[tuple[Any, Any]]:
    """What a regression head says and what is right, [n] of each: a pair for every number that it gives."""
    found, wanted = [], []
    for inputs, labels in _batches(model, examples, **options):
        found.append(model(task, **inputs).float().cpu().numpy())
        wanted.append(np.asarray(labels).reshape(len(labels), -1))
    return list(zip(np.concatenate(found).T, np.concatenate(wanted).T))


def pearson(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Pearson's r between a regression head's numbers and the labels, −1 to 1; the mean of several numbers' own."""
    return float(np.mean([correlation(*pair) for pair in _numbers(model, task, examples, **options)]))


def mse(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Mean squared error of a regression head's numbers."""
    return float(np.mean([np.mean((one - other) ** 2) for one, other in _numbers(model, task, examples, **options)]))


def ranks(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Spearman's ρ between a regression head's numbers and the labels, −1 to 1; as in `pearson`."""
    return float(np.mean([rank_correlation(*pair) for pair in _numbers(model, task, examples, **options)]))


@torch.no_grad()
def labels_f1(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """F1 of the classes of all examples together (micro), where each may have several; one is given from 0.5 on."""
    right = found = wanted = 0
    for inputs, labels in _batches(model, examples, **options):
        given = (model(task, **inputs) > 0).cpu().numpy()
        right, found, wanted = right + int((given & (labels == 1)).sum()), found + given.sum(), wanted + labels.sum()
    return float(f1(right, found, wanted))


def _in_positions(model: MultiTaskModel, examples: Examples, options: dict[str, Any]) -> dict[str, Any]:
    """Options with windows that are no longer than the model has positions for."""
    asked = options.get("max_length")
    return {**options, "max_length": text_length(tokenizer_of(model.processor), asked, examples.longest[0])}


def _spans(model: MultiTaskModel, task: str, examples: Examples, score: Any, **options: Any) -> float:
    """Mean score of the answers to questions; where a question has no answer, it may be empty, as in SQuAD 2."""
    may_be_empty, options = not all(examples.labels), _in_positions(model, examples, options)
    found = predictions.spans(model, task, examples.inputs, may_be_empty=may_be_empty, **options)
    return float(np.mean([score(text, wanted) for text, wanted in zip(found, examples.labels)]))


@torch.no_grad()
def _tags(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> list[tuple[list[Any], list[int]]]:
    """The class of each word of each text, found and right; words without a label are left out."""
    if examples.kind == "words":
        texts = predictions.tags(model, task, examples.inputs, **_in_positions(model, examples, options))
        found = [[label for _, label in text] for text in texts]
        pairs = list(zip(found, examples.labels))
    else:
        scored = _batches(model, examples, **options)
        pairs = [
            (row, wanted)
            for inputs, labels in scored
            for row, wanted in zip(model(task, **inputs).argmax(-1).tolist(), labels)
        ]
    kept = [[(one, right) for one, right in zip(*pair) if right != IGNORED] for pair in pairs]
    return [([one for one, _ in text], [right for _, right in text]) for text in kept]


def tag_accuracy(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Share of words whose class is right."""
    found = [bool(one == right) for pair in _tags(model, task, examples, **options) for one, right in zip(*pair)]
    return sum(found) / max(len(found), 1)


def tag_f1(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """F1 of the entities that tags such as B-PER and I-PER stand for."""
    names = model.labels(task)
    pairs = _tags(model, task, examples, **options)
    texts = [[[OUTSIDE if one is None else names[one] for one in tags] for tags in pair] for pair in pairs]
    return entity_f1([found for found, _ in texts], [wanted for _, wanted in texts])


@torch.no_grad()
def choice_accuracy(model: MultiTaskModel, task: str, examples: Examples, **options: Any) -> float:
    """Share of examples whose best-scored choice is the right one."""
    if examples.kind == "batches":
        return accuracy(model, task, examples, **options)
    right = 0
    size, advance = options.pop("batch_size", 32), options.pop("advance", lambda count: None)
    for start in range(0, len(examples), size):
        chunk = examples.take(np.arange(start, min(start + size, len(examples))))
        scores = [
            row for inputs, _ in _batches(model, chunk, batch_size=size, **options) for row in model(task, **inputs)
        ]
        found = best_choices(scores, chunk.inputs)
        right += sum(int(one == other) for one, other in zip(found, chunk.labels))
        advance(len(chunk))
    return right / len(examples)


Scorer = Callable[..., float]
# How each kind of examples may be scored, by name; the first is what is taken where nothing else is asked for.
METRICS: dict[str, dict[str, Scorer]] = {
    "text": {"accuracy": accuracy},
    "image": {"accuracy": accuracy},
    "seq2seq": {"exact_match": exact_match, "spearman": spearman},
    **{kind: {"log_perplexity": log_perplexity} for kind in ("tokens", "causal", "chat")},
}
# … and where a head is scored on them, by what it answers.
HEAD_METRICS: dict[str, dict[str, Scorer]] = {
    "class": {"accuracy": accuracy},
    "number": {"spearman": ranks, "pearson": pearson, "mse": mse},
    "labels": {"f1": labels_f1},
    "tags": {"f1": tag_f1, "accuracy": tag_accuracy},
    "span": {"f1": partial(_spans, score=span_f1), "exact_match": partial(_spans, score=span_match)},
    "choice": {"accuracy": choice_accuracy},
}
# What they are called.
ANSWERS = {
    "number": "numbers",
    "labels": "several classes",
    "tags": "classes of words",
    "span": "answers to questions",
    "choice": "choices",
}


def scorer_of(examples: Examples) -> Scorer:
    """The metric that examples are scored by.

    Raises:
        ValueError: there is none for their kind, or not the one that is asked for.
    """
    return _named_scorer(examples)[1]


def _named_scorer(examples: Examples) -> tuple[str, Scorer]:
    head = HEAD_METRICS.get(examples.labelled or "")
    metrics = head or METRICS.get(examples.kind)
    if metrics is None:
        raise InputError(f"{examples.kind} examples cannot be scored; only calibrated on")
    name = examples.metric or next(iter(metrics))
    if name not in metrics:
        scored = ANSWERS.get(examples.labelled or "", f"{examples.kind} examples")
        raise InputError(f"metric: {scored} are scored by {', '.join(metrics)}, not by {examples.metric}")
    return name, metrics[name]


def metric_of(examples: Examples) -> str:
    """Name of the metric that examples are scored by; errors as in `scorer_of`."""
    return _named_scorer(examples)[0]


def metrics_of(evaluation: Mapping[str, Examples]) -> dict[str, str]:
    """Task → name of the metric that its examples are scored by; errors as in `scorer_of`."""
    return {task: metric_of(examples) for task, examples in evaluation.items()}
