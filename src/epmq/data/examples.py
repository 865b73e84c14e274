"""What an example is: text, question, image, conversation, window of tokens or ready batch, with label or target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# How a model takes its texts: as they are, as the beginning of a running text, as source and target, as a question and
# its context, word by word, or as a text and what may follow it.
USES = ("text", "causal", "seq2seq", "question", "words", "choices")


@dataclass(frozen=True)
class Examples:
    """Inputs and labels of one split of one task.

    Attributes:
        kind: `text`, `image`, `image_text`, `seq2seq`, `causal` (documents for a language model), `chat`, `question`,
            `words`, `choices`, `tokens` (windows of token ids, see `epmq.data.encoding.pack`) or `batches` (ready model
            inputs).
        inputs: n of them: strings or pairs of strings, such as question and context; images (one uint8 array
            [n, height, width, 3], file paths or pictures) or pairs of image (or a list of them, or None) and string;
            conversations (lists of messages, whose contents are strings or lists of parts, see
            `epmq.data.pictures`); lists of words; pairs of a text and a list of choices; an int64 array [n, tokens];
            dicts of tensors.
        labels: of each example, as `labelled` says, or None where the source has none or they are not asked for: class
            indices, int64 [n]; numbers, float64 [n] or [n, numbers]; zeros and ones, int64 [n, classes]; lists of class
            indices; lists of texts. Of ready batches: those of all their rows.
        targets: for `seq2seq`: n strings.
        template: the chat template of conversations; None means the tokenizer's own.
        longest: tokens that the model has positions for, of a text and of a target; None where it takes any number.
        metric: name of the function in `epmq.pipeline.metrics` that scores them; None leaves it to their kind.
        labelled: kind of the labels (`epmq.data.labels.Labels`) of a head that they are scored with; None for none.
    """

    kind: str
    inputs: Any
    labels: Any = None
    targets: list[str] | None = None
    metric: str | None = None
    template: str | None = None
    longest: tuple[int | None, int | None] = (None, None)
    labelled: str | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: np.ndarray) -> "Examples":
        """The examples at the positions `index`, in that order."""
        inputs, labels, targets = (_taken(values, index) for values in (self.inputs, self.labels, self.targets))
        return replace(self, inputs=inputs, labels=labels, targets=targets)

    def draw(self, count: int | None, seed: int) -> "Examples":
        """A seeded draw of `count` examples without replacement; all of them, in order, if `count` is None."""
        if count is None or count >= len(self):
            return self
        return self.take(draw_index(len(self), count, seed))

    def by_length(self) -> "Examples":
        """Texts in order of their length, so that batches carry little padding; anything else as it is."""
        if self.kind not in ("text", "seq2seq", "causal"):
            return self
        lengths = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in self.inputs]
        return self.take(np.argsort(lengths, kind="stable"))


def _taken(values: Any, index: np.ndarray) -> Any:
    return values if values is None else values[index] if isinstance(values, np.ndarray) else [values[i] for i in index]


def draw_index(size: int, count: int, seed: int) -> np.ndarray:
    """The positions of a seeded draw of `count` among `size` examples without replacement, in order."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:count])


@dataclass(frozen=True)
class Fields:
    """Names of a table's columns; two text columns make pairs.

    Attributes:
        prompt: a text made of columns, such as `Is "{sentence}" good English?`; takes the place of `text`.
        answer: a target made of columns, such as `{label:.1f}`; takes the place of `target`.
        answers: a target for each class index in the label column; takes the place of `target`.
        label: several columns make one label, a list.
        references: the right answers to a question.
        words, tags: the words of a text, and the class of each.
        choices: one column with a list of texts, or a column for each.
    """

    text: str | tuple[str, str] = "text"
    label: str | tuple[str, ...] = "label"
    target: str = "target"
    image: str = "image"
    messages: str = "messages"
    prompt: str | None = None
    answer: str | None = None
    answers: tuple[str, ...] | None = None
    question: str = "question"
    context: str = "context"
    references: str = "answers"
    words: str = "tokens"
    tags: str = "tags"
    choices: str | tuple[str, ...] = "choices"


class Pictures(Sequence[Any]):
    """Pictures in a column of a `datasets.Dataset`, each decoded when it is asked for: all need not fit in memory."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[int(index)][self._column]
