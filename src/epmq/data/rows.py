"""Examples from rows: what each is, by the columns it has, and its label as it is asked for."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from epmq.data.examples import Examples, Fields
from epmq.data.labels import EXAMPLES_OF, Labels
from epmq.data.pictures import Messages, as_list, as_parts, pictures_in, read_parts, with_pictures
from epmq.errors import InputError, reason

# Class indices, as they are read where nothing is known of a head.
INDICES = Labels()


def from_rows(
    rows: Iterable[tuple[str, Any]], fields: Fields, use: str, source: str, labels: Labels | None = INDICES
) -> Examples:
    """Examples from rows, each with what to call it in an error, such as `line 3`; `source` goes in front of that.

    Raises:
        ValueError: a row lacks a field, or holds something else in it; it is named.
    """
    kind, inputs, targets, read = "", list[Any](), list[str](), list[Any]()
    for where, row in rows:
        where = f"{source}, {where}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: no text field {fields.text!r} (not an object with named fields)")
        kind = kind or _kind(row, fields, use)
        if kind in ("text", "causal") and row.get(fields.image) is not None and isinstance(fields.text, str):
            # The first rows had no picture, which is no matter.
            kind, inputs = "image_text", [(None, text) for text in inputs]
        inputs.append(_input(row, kind, fields, where))
        if kind == "seq2seq":
            targets.append(_target(row, fields, where))
        column = _label_column(kind, fields)
        asked = labels is not None and kind in EXAMPLES_OF[labels.kind]
        if labels is not None and asked and (column in row if isinstance(column, str) else set(column) <= row.keys()):
            read.append(read_label(row, column, where, labels))
            if kind == "words" and len(read[-1]) != len(inputs[-1]):
                raise InputError(f"{where}: {len(inputs[-1])} words, but {len(read[-1])} in {column!r}")
    if read and len(read) != len(inputs):
        raise InputError(f"{source}: only {len(read)} of {len(inputs)} lines have the field {column!r}")
    found = labels.array(read) if labels is not None and read else None
    return _pictured_first(Examples(kind or "text", inputs, found, targets if kind == "seq2seq" else None))


def _pictured_first(examples: Examples) -> Examples:
    """Examples with those that have pictures in front, so that a batch is of one form."""
    if examples.kind not in ("chat", "image_text"):
        return examples
    without = [not pictures_in(one) for one in examples.inputs]
    return examples.take(np.argsort(without, kind="stable")) if len(set(without)) > 1 else examples


def _kind(row: Mapping[str, Any], fields: Fields, use: str) -> str:
    """What a row is, from the columns it has. A head of any kind can be calibrated on mere texts."""
    if fields.messages in row:
        return "chat"
    if fields.image in row:
        return "image_text" if fields.text in row else "image"
    choices = (fields.choices,) if isinstance(fields.choices, str) else fields.choices
    needed = {"question": (fields.question, fields.context), "words": (fields.words,), "choices": choices}
    missing = set(needed.get(use, ())) - row.keys()
    return "text" if missing == set(needed.get(use, "-")) else use


def _label_column(kind: str, fields: Fields) -> str | tuple[str, ...]:
    return {"question": fields.references, "words": fields.tags}.get(kind, fields.label)


def _input(row: Mapping[str, Any], kind: str, fields: Fields, where: str) -> Any:
    if kind == "chat":
        messages = _messages(row.get(fields.messages), fields.messages, where)
        return with_pictures(messages, as_list(row.get(fields.image)), where)
    if kind == "image_text":
        return row.get(fields.image), _string(row, str(fields.text), where, "text")
    if kind == "image":
        image = row.get(fields.image)
        if image is None or isinstance(image, (list, tuple)):
            several = ": several images need a text" if image else ""
            raise InputError(f"{where}: no image field {fields.image!r}{several}")
        return image
    if kind == "question":
        return _string(row, fields.question, where, "question"), _string(row, fields.context, where, "context")
    if kind == "words":
        return _strings(row.get(fields.words), fields.words, where)
    text = _text(row, fields, where)
    if kind != "choices":
        return text
    if not isinstance(text, str):
        raise InputError(f"{where}: the text of choices must be one column, not two: make it with a prompt")
    if isinstance(fields.choices, str):
        return text, _strings(row.get(fields.choices), fields.choices, where)
    return text, [_string(row, column, where, "choice") for column in fields.choices]


def _text(row: Mapping[str, Any], fields: Fields, where: str) -> Any:
    if fields.prompt is not None:
        return _filled(fields.prompt, row, where)
    if isinstance(fields.text, str):
        return _string(row, fields.text, where, "text")
    first, second = fields.text
    return _string(row, first, where, "text"), _string(row, second, where, "text")


def _strings(value: Any, field: str, where: str) -> list[str]:
    """A list of texts, or what holds one under `text`."""
    value = value.get("text") if isinstance(value, Mapping) else value
    good = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
    if not good or not all(isinstance(one, str) for one in value):
        raise InputError(f"{where}: field {field!r} must be a list of texts")
    return [_whole(one, field, where) for one in value]


def _target(row: Mapping[str, Any], fields: Fields, where: str) -> str:
    if fields.answer is not None:
        return _filled(fields.answer, row, where)
    if fields.answers is None:
        return _string(row, fields.target, where, "target")
    if not isinstance(fields.label, str):
        raise InputError(f"{where}: answers are chosen by one label column, not {len(fields.label)}")
    label = int(read_label(row, fields.label, where, INDICES))
    if not 0 <= label < len(fields.answers):
        raise InputError(f"{where}: field {fields.label!r} is {label}, but there are {len(fields.answers)} answers")
    return fields.answers[label]


def _filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template with a row's columns in it."""
    try:
        return _whole(template.format_map(row), template, where)
    except KeyError as error:
        raise InputError(f"{where}: no field {error.args[0]!r}, which {template!r} asks for") from None
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {template!r} cannot be filled in ({reason(error)})") from None


def _string(row: Mapping[str, Any], field: str, where: str, what: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{where}: no {what} field {field!r}")
    return _whole(value, field, where)


def _whole(value: str, field: str, where: str) -> str:
    """A text that can be encoded: JSON may hold one half of a character of two."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field {field!r} has half a character ({error.reason})") from None
    return value


def read_label(row: Mapping[str, Any], column: str | tuple[str, ...], where: str, labels: Labels) -> Any:
    """A row's label as it is scored; several columns are a list."""
    try:
        return labels.read(row.get(column) if isinstance(column, str) else [row[name] for name in column])
    except InputError as error:
        shown = repr(column) if isinstance(column, str) else ", ".join(map(repr, column))
        raise InputError(f"{where}: field {shown} {error}") from None


def _messages(value: Any, field: str, where: str) -> Messages:
    good = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
    if not good or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value):
        raise InputError(f"{where}: field {field!r} must be a list of messages with 'role' and 'content'")
    contents = [read_parts(message["content"], where) for message in value]
    messages = [{"role": _whole(str(m["role"]), field, where), "content": c} for m, c in zip(value, contents)]
    for text in (part.get("text", "") for message in messages for part in as_parts(message["content"])):
        _whole(text, field, where)
    return messages
