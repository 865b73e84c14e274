"""How labels are read: as what a task answers, with the names of its classes."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from epmq.errors import InputError

# Words without a label, as data collators of transformers have them.
IGNORED = -100
# The kinds of examples that labels of a kind belong to.
EXAMPLES_OF = {
    **dict.fromkeys(("class", "number", "labels"), ("text", "image", "chat", "batches")),
    "tags": ("words", "batches"),
    "choice": ("choices", "batches"),
    "span": ("question",),
}


@dataclass(frozen=True)
class Labels:
    """What a label is.

    Attributes:
        kind: `class` (one of several), `number` (one, or a list), `labels` (any of several classes), `tags` (a class a
            word), `choice` (one of an example's own choices) or `span` (texts that answer a question).
        names: names of the classes; may be empty.
        size: how many classes, or numbers; None if that is not known.
    """

    kind: str = "class"
    names: tuple[str, ...] = ()
    size: int | None = None

    def read(self, value: Any) -> Any:
        """One label as it is scored: an index, a number, a list of them, or a list of texts.

        Raises:
            InputError: it is none; the message goes on after "field 'label' …".
        """
        if self.kind == "number":
            return self._number(value)
        if self.kind == "labels":
            return self._several(value)
        if self.kind == "tags":
            return self._tags(value)
        return _texts(value) if self.kind == "span" else self._index(value)

    def array(self, values: list[Any]) -> Any:
        """The labels of all examples: an array [n] or [n, classes] where each has as many, or a list."""
        if self.kind in ("tags", "span"):
            return values
        return np.asarray(values, dtype=np.float64 if self.kind == "number" else np.int64)

    def knows(self, names: Sequence[str]) -> bool:
        """Whether one of some names is a class: such labels are taken by name, whatever their numbers are."""
        return any(self._named(name) is not None for name in names)

    def _named(self, name: str) -> int | None:
        """The class of a name; upper and lower case are told apart only where a head has both."""
        if name in self.names:
            return self.names.index(name)
        alike = [index for index, known in enumerate(self.names) if known.casefold() == name.strip().casefold()]
        return alike[0] if len(alike) == 1 else None

    def _index(self, value: Any) -> int:
        number = value
        if isinstance(value, (bool, np.bool_)):
            named = self._named(str(bool(value)))
            return int(value) if named is None else named
        if isinstance(value, str):
            with suppress(ValueError):
                number = int(value)  # csv knows nothing else than text
            named = self._named(value)
            if named is not None and number in (value, named):
                return named
            if named is not None:
                raise InputError(
                    f"is {value!r}, which may be the head's class {value!r} or its class number {value}: give numbers "
                    "as integers (.jsonl, .parquet), or names that are no numbers"
                )
            if number is value and self.names:
                raise InputError(f"is {value!r:.100}, but the head's classes are {', '.join(self.names):.200}")
        if isinstance(number, (list, tuple, np.ndarray)):
            raise InputError(
                "must be a class index (an integer) or a class name, not a list: a head gives several classes only "
                'with "problem_type": "multi_label_classification" in its config.json'
            )
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise InputError("must be a class index (an integer)" + (" or a class name" if self.names else ""))
        if not -(2**63) <= number < 2**63:
            raise InputError(f"is {number:.3g}, which is no class index")
        return int(number)

    def _number(self, value: Any) -> float | list[float]:
        values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        if len(values) != (self.size or 1):
            raise InputError(f"must be {_several(self.size or 1, 'number')}, as the head gives {self.size or 1}")
        numbers = []
        for one in values:
            number = math.nan
            if isinstance(one, (int, float, str, np.number, np.bool_)):
                with suppress(ValueError, OverflowError):
                    number = float(one)
            if not math.isfinite(number):
                raise InputError(f"must be a number, found {one!r:.50}")
            numbers.append(number)
        return numbers if len(numbers) > 1 else numbers[0]

    def _several(self, value: Any) -> list[int]:
        """Zeros and ones by class: as they are, or from names or indices of the classes."""
        values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        size = self.size or len(self.names)
        flags: list[Any] = [
            {"0": 0, "1": 1}.get(one) if isinstance(one, str) and one not in self.names else one for one in values
        ]
        if len(values) == size and all(np.ndim(one) == 0 and one in (0, 1) for one in flags):
            return [int(one) for one in flags if one is not None]
        row = [0] * size
        for one in values:
            row[self._within(self._index(one))] = 1
        return row

    def _tags(self, value: Any) -> list[int]:
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise InputError("must be a list with a class for each word")
        indices = [self._index(one) for one in value]
        return [index if index == IGNORED else self._within(index) for index in indices]

    def _within(self, index: int) -> int:
        size = self.size or len(self.names) or index + 1
        if not 0 <= index < size:
            raise InputError(f"has class {index}, but the head has {size} classes")
        return index


def _texts(value: Any) -> list[str]:
    """The right answers to a question, in SQuAD's form or as texts; none where the context does not answer it."""
    if isinstance(value, Mapping):
        value = value.get("text")
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise InputError("must hold the right answers: texts, or {text: [...], answer_start: [...]} as in SQuAD")
    texts = [one.get("text") if isinstance(one, Mapping) else one for one in values]
    if not all(isinstance(text, str) for text in texts):
        raise InputError("must hold the right answers as texts")
    return [str(text) for text in texts]


def _several(count: int, noun: str) -> str:
    return f"a {noun}" if count == 1 else f"a list of {count} {noun}s"
