"""Pictures among texts: in the parts of messages, or beside them in a row; and what any source of a picture holds."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from epmq.errors import InputError, error_context

Messages = list[dict[str, Any]]
# Fields of a part of a message that say which picture it is, in the order in which they are asked.
SOURCES = ("image", "path", "url")
# What a joint processor calls the tokens that stand for what is no text.
TOKENS = ("image_token", "boi_token", "video_token", "audio_token")


def read_parts(content: Any, where: str) -> Any:
    """The content of a message: a text, or a list of parts, each a text or a picture (`{"type": "image"}`).

    Raises:
        InputError: a part is neither.
    """
    if not isinstance(content, (list, tuple, np.ndarray)):
        return str(content)
    return [_read_part(part, where) for part in content]


def _read_part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image":
        raise InputError(f"{where}: a part of a message must be a text or an image, found {part!s:.60}")
    source = next((part[name] for name in SOURCES if part.get(name) is not None), None)
    if isinstance(source, str) and source.startswith(("http:", "https:")):
        raise InputError(f"{where}: {source:.60} is not fetched: give a file")
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def as_list(pictures: Any) -> list[Any]:
    """The pictures in an image column: none, one, or a list of them."""
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def with_pictures(messages: Messages, pictures: Sequence[Any], where: str) -> Messages:
    """Messages with a row's pictures where their parts leave room; where none does, before the first user's words.

    Raises:
        InputError: there are more, or fewer.
    """
    if pictures and not _empty(messages):
        asked = next((number for number, one in enumerate(messages) if one["role"] == "user"), 0)
        first = {
            **messages[asked],
            "content": [{"type": "image"}] * len(pictures) + as_parts(messages[asked]["content"]),
        }
        messages = [*messages[:asked], first, *messages[asked + 1 :]]
    count = len(_empty(messages))
    if count != len(pictures):
        raise InputError(f"{where}: {len(pictures)} images, but the messages have room for {count}")
    left = iter(pictures)
    return map_parts(messages, lambda part: {**part, "image": next(left)} if part == {"type": "image"} else part)


def as_parts(content: Any) -> list[dict[str, Any]]:
    """The content of a message as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def map_parts(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    """The same messages, each part of their contents changed, in order; contents that are texts stay."""
    contents = [one["content"] for one in messages]
    changed = [content if isinstance(content, str) else [change(part) for part in content] for content in contents]
    return [{**one, "content": content} for one, content in zip(messages, changed)]


def map_pictures(example: Any, change: Callable[[Any], Any]) -> Any:
    """An example with every picture changed: a conversation, a picture or a list of them, or such with a text."""
    if isinstance(example, list) and example and isinstance(example[0], dict) and "role" in example[0]:
        return map_parts(example, lambda part: {**part, "image": change(part["image"])} if "image" in part else part)
    if isinstance(example, tuple):
        return map_pictures(example[0], change), example[1]
    if isinstance(example, list):
        return [change(picture) for picture in example]
    return None if example is None else change(example)


def pictures_in(example: Any) -> list[Any]:
    """The pictures of a conversation, or of a pair of pictures and text, in order."""
    if isinstance(example, tuple):
        return as_list(example[0])
    contents = [one["content"] for one in example]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part["image"] for part in parts if "image" in part]


def _empty(messages: Messages) -> list[dict[str, Any]]:
    """Parts that stand for a picture which is not there."""
    return [part for one in messages for part in as_parts(one["content"]) if part == {"type": "image"}]


def conversation(pictures: Sequence[Any], text: str) -> Messages:
    """What a user shows and says, as a conversation of one message."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def without_sources(messages: Messages) -> Messages:
    """Messages as chat templates take them of a model that reads pictures: contents in parts, which hold no picture."""
    in_parts = [{**one, "content": as_parts(one["content"])} for one in messages]
    return map_parts(in_parts, lambda part: {"type": "image"} if part["type"] == "image" else part)


def placeholders(processor: Any) -> list[str]:
    """The tokens by which a joint processor's texts name what is no text."""
    named = (getattr(processor, name, None) for name in TOKENS)
    return [token for token in named if isinstance(token, str)]


def placeholder_ids(processor: Any) -> list[int]:
    """Numbers of the tokens that stand for what is no text, one or several for each picture."""
    found = list[Any]()
    for name in TOKENS:
        found += [getattr(processor, f"{name}_id", None), *(getattr(processor, f"{name}_ids", None) or ())]
    return sorted({number for number in found if type(number) is int})


def open_picture(source: Any) -> Any:
    """A picture in three channels, of a path, bytes, a row of a parquet file or a picture; an array as it is.

    Raises:
        InputError: it cannot be read; the file is named.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Mapping):  # as parquet files of pictures hold them
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if not isinstance(source, (str, Path, bytes)):
        return source  # an array
    name, file = ("a picture", BytesIO(source)) if isinstance(source, bytes) else (source, source)
    with error_context(name, "not a readable image"), Image.open(file) as image:
        return image.convert("RGB")
