"""Texts in windows of tokens of which each knows its place in the text: for answers that are a part of the text.

A text that is longer than a model takes is cut into several windows that overlap, so that no part of it is lost.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epmq.errors import InputError

# What a text is split into where it does not come as words: runs of letters and digits, and each other sign.
WORD = re.compile(r"\w+|[^\w\s]")
# Tokenizers that have no limit say so with a huge number.
NO_LIMIT = 10**6

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Some tokens of one text.

    Attributes:
        owner: number of the text.
        inputs: what the tokenizer gives, one list of numbers each.
        places: from where to where in the text each token stands; None for special tokens and for the question.
        words: number of the tokenizer's own word that each token belongs to.
    """

    owner: int
    inputs: dict[str, list[int]]
    places: list[Span | None]
    words: list[int | None]

    def __len__(self) -> int:
        return len(self.places)


def split_words(text: str) -> list[Span]:
    """From where to where the words of a text stand."""
    return [match.span() for match in WORD.finditer(text)]


def join_words(words: Sequence[str]) -> tuple[str, list[Span]]:
    """Words as one text, with a space between them, and from where to where each stands in it.

    Tokenizers read it as they read the words one by one, and those that put a space into a word's first token do too.
    """
    spans, start = list[Span](), 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def windows(tokenizer: Any, texts: Sequence[Any], max_length: int | None) -> list[Window]:
    """The windows of all texts, in order; of a pair (question and context), those of its second text.

    Raises:
        InputError: the tokenizer does not tell where its tokens stand, or a question leaves no room for its context.
    """
    if not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        raise InputError(f"{name} does not tell where its tokens stand in a text: it needs a tokenizer.json")
    limit = min(max_length or NO_LIMIT, tokenizer.model_max_length)
    return [window for owner, text in enumerate(texts) for window in _windows_of(tokenizer, owner, text, limit)]


def _windows_of(tokenizer: Any, owner: int, text: Any, limit: int) -> Iterator[Window]:
    part = 0 if isinstance(text, str) else 1
    arguments = (text,) if isinstance(text, str) else tuple(text)
    whole = tokenizer(*arguments, return_offsets_mapping=True, truncation=False, verbose=False)
    found = whole
    if len(whole["input_ids"]) > limit:
        room = limit - (len(whole["input_ids"]) - whole.sequence_ids().count(part))
        if room < 1:
            raise InputError(f"{arguments[0]!r:.60} leaves no room for its context within {limit} tokens")
        found = tokenizer(
            *arguments,
            return_offsets_mapping=True,
            truncation="only_second" if part else True,
            max_length=limit,
            stride=min(limit // 4, room // 2),
            return_overflowing_tokens=True,
        )
        found.pop("overflow_to_sample_mapping", None)
    for number, encoding in enumerate(found.encodings):
        inputs = {name: values[number] if found is not whole else values for name, values in found.items()}
        offsets = inputs.pop("offset_mapping")
        own = [sequence == part for sequence in encoding.sequence_ids]
        places = [tuple(place) if mine else None for place, mine in zip(offsets, own)]
        yield Window(owner, inputs, places, list(encoding.word_ids))


def window_batches(
    tokenizer: Any, found: Sequence[Window], batch_size: int
) -> Iterator[tuple[list[Window], dict[str, Any]]]:
    """Windows with the inputs made of them, by length, batch by batch."""
    ordered = sorted(found, key=len)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        columns = {name: [window.inputs[name] for window in chunk] for name in chunk[0].inputs}
        yield chunk, dict(tokenizer.pad(columns, padding=True, return_tensors="pt", verbose=False))


def best_span(scores: torch.Tensor, window: Window, longest: int) -> tuple[float, Span | None]:
    """The likeliest answer in a window, and its score: the sum of those of its first and its last token.

    Args:
        scores: of each token as the first and as the last one, [tokens, 2].
        longest: how many tokens an answer may have.

    Returns:
        the span in the text; None where the window has no token of the text.
    """
    inside = [index for index, place in enumerate(window.places) if place is not None and place[0] < place[1]]
    if not inside:
        return -torch.inf, None
    start, end = scores[inside, 0].float(), scores[inside, 1].float()
    pairs = start[:, None] + end
    pairs = pairs.masked_fill(~torch.ones_like(pairs, dtype=torch.bool).triu().tril(longest - 1), -torch.inf)
    best = int(pairs.argmax())
    first, last = (window.places[inside[index]] for index in divmod(best, len(inside)))
    assert first is not None and last is not None
    return float(pairs.flatten()[best]), (first[0], last[1])


def word_tokens(window: Window, text: str, spans: Sequence[Span]) -> Iterator[tuple[tuple[int, int | None], int, Span]]:
    """The tokens of a window that stand in a word: which word, which token, and where it stands but for space.

    A word is told by the number of its span, and by the tokenizer's own word: it may split a span further, as in
    scripts without spaces.
    """
    owners = {place: number for number, (start, end) in enumerate(spans) for place in range(start, end)}
    for index, (place, word) in enumerate(zip(window.places, window.words)):
        first = None if place is None else next((i for i in range(*place) if not text[i].isspace()), None)
        if place is not None and first in owners:
            yield (owners[first], word), index, (first, place[1])
