"""How close answers are to the right ones: pure functions."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Prefixes of tags such as B-PER: of the first word of an entity, of those that go on with it, and of its last one.
BEGINS, GOES_ON, ENDS = "BSU", "IEL", "ESLU"
OUTSIDE = "O"
# An entity: its type, its first word and the word after its last one.
Entity = tuple[str, int, int]


def correlation(one: Any, other: Any) -> float:
    """Pearson's r; 0 where all values are equal."""
    one, other = (np.asarray(values, dtype=float) - np.mean(values) for values in (one, other))
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size else 0.0


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of the ranks, equal values sharing the mean of theirs; 0 where all are equal."""
    ranks = []
    for values in (one, other):
        _, index, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[index])
    return correlation(*ranks)


def f1(right: float, found: float, wanted: float) -> float:
    """Harmonic mean of precision and recall, from counts; 0 where nothing is right, 1 where there is nothing at all."""
    return 2 * right / (found + wanted) if found + wanted else 1.0


def are_entities(names: Iterable[str]) -> bool:
    """Whether class names are tags of entities, such as O, B-PER and I-PER."""
    names = list(names)
    tags = [re.fullmatch(rf"[{BEGINS}{GOES_ON}]-.+", name) is not None for name in names]
    return any(tags) and all(tag or name == OUTSIDE for tag, name in zip(tags, names))


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that the tags of a text stand for.

    An entity begins at a B tag, and at any other where none of its type goes on, as in CoNLL's own script: of
    I-PER I-LOC each is one.
    """
    found, kind, start = set[Entity](), "", 0
    for index, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        goes_on = bool(kind) and prefix in GOES_ON and name == kind
        if kind and not goes_on:
            found.add((kind, start, index))
            kind = ""
        if prefix != OUTSIDE and not goes_on:
            kind, start = name, index
        if kind and prefix in ENDS:
            found.add((kind, start, index + 1))
            kind = ""
    return found


def entity_f1(found: Iterable[Sequence[str]], wanted: Iterable[Sequence[str]]) -> float:
    """F1 of the entities of all texts: one is right if its type and its first and last word are."""
    pairs = [(entities(one), entities(other)) for one, other in zip(found, wanted)]
    return f1(*(sum(map(len, sets)) for sets in zip(*((one & other, one, other) for one, other in pairs))))


def plain(text: str) -> str:
    """A text as SQuAD compares it: in lower case, without punctuation, articles and needless space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def span_match(found: str, wanted: Sequence[str]) -> float:
    """1 if a text is one of the right answers, as SQuAD compares them; an empty one is right where there is none."""
    return float(plain(found) in {plain(text) for text in wanted or [""]})


def span_f1(found: str, wanted: Sequence[str]) -> float:
    """F1 of the words of an answer against the right answer that it is closest to, as SQuAD counts them."""
    return max(_words_f1(plain(found).split(), plain(text).split()) for text in wanted or [""])


def _words_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return f1((Counter(found) & Counter(wanted)).total(), len(found), len(wanted))
