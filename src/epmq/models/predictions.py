"""What the scores of a task's head say: the answers to texts, one by one or in windows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from epmq.data.encoding import to_device
from epmq.data.processors import tokenizer_of
from epmq.data.windows import (
    Span,
    Window,
    best_span,
    join_words,
    split_words,
    window_batches,
    windows,
    word_tokens,
)

# How many tokens the answer to a question may have.
LONGEST_ANSWER = 30
# A text that is read word by word: the text, where its words stand, and whether they are the user's own.
Words = tuple[str, list[Span], bool]


def _scored(
    model: Any, task: str, found: Sequence[Window], batch_size: int, advance: Callable[[int], Any]
) -> list[tuple[Window, Tensor]]:
    """Windows in order, each with its tokens' scores [tokens, …]; `advance` is called with texts that are done."""
    scored: dict[int, tuple[Window, Tensor]] = {}
    numbers = {id(window): number for number, window in enumerate(found)}
    left = {window.owner: 0 for window in found}
    for window in found:
        left[window.owner] += 1
    for chunk, inputs in window_batches(tokenizer_of(model.processor), found, batch_size):
        scores = model(task, **to_device(inputs, model.device)).cpu()
        for row, window in enumerate(chunk):
            scored[numbers[id(window)]] = window, scores[row, : len(window)]
            left[window.owner] -= 1
        advance(sum(not left[owner] for owner in {window.owner for window in chunk}))
    return [scored[number] for number in range(len(found))]


@torch.no_grad()
def spans(
    model: Any,
    task: str,
    pairs: Iterable[Sequence[str]],
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
    may_be_empty: bool = False,
) -> list[str]:
    """The answer to each question, a part of its context.

    Args:
        model: an `epmq.models.multitask.MultiTaskModel`.
        pairs: question and context.
        may_be_empty: give an empty answer where the tokenizer's first token is the likelier one, as in SQuAD 2.
    """
    pairs = [tuple(pair) for pair in pairs]
    best: dict[int, tuple[float, str]] = {}
    empty: dict[int, float] = {}
    for window, scores in _scored(
        model, task, windows(tokenizer_of(model.processor), pairs, max_length), batch_size, advance
    ):
        score, span = best_span(scores, window, LONGEST_ANSWER)
        nothing = float(scores[0].float().sum())
        empty[window.owner] = min(empty.get(window.owner, nothing), nothing)
        if span is not None and score > best.get(window.owner, (-torch.inf, ""))[0]:
            best[window.owner] = score, pairs[window.owner][1][slice(*span)].strip()
    none = (-torch.inf, "")
    if may_be_empty:
        return ["" if empty[i] > best.get(i, none)[0] else best.get(i, none)[1] for i in range(len(pairs))]
    return [best.get(i, none)[1] for i in range(len(pairs))]


def _as_words(text: str | Sequence[str]) -> Words:
    if isinstance(text, str):
        return text, split_words(text), False
    return *join_words(text), True


@torch.no_grad()
def tags(
    model: Any,
    task: str,
    texts: Iterable[str | Sequence[str]],
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[list[tuple[str, int | None]]]:
    """The words of each text with the class of each: that of its first token.

    Args:
        texts: strings, or lists of words. A word that the tokenizer makes nothing of has no class.
    """
    given = [_as_words(text) for text in texts]
    found: list[dict[tuple[int, int | None], tuple[int, int, int]]] = [{} for _ in given]
    plain = [text for text, _, _ in given]
    for window, scores in _scored(
        model, task, windows(tokenizer_of(model.processor), plain, max_length), batch_size, advance
    ):
        text, words, own = given[window.owner]
        classes, known = scores.argmax(-1).tolist(), found[window.owner]
        for (number, part), index, (start, end) in word_tokens(window, text, words):
            key = (number, None if own else part)
            label, first, last = known.get(key, (classes[index], start, end))
            known[key] = label, min(first, start), max(last, end)
    answers = []
    for (text, words, own), known in zip(given, found):
        if own:
            answers.append([(text[slice(*span)], known.get((i, None), (None,))[0]) for i, span in enumerate(words)])
        else:
            answers.append([(text[start:end], label) for label, start, end in sorted(known.values(), key=_place)])
    return answers


def _place(word: tuple[int, int, int]) -> int:
    return word[1]
