"""From examples to model inputs: cut, padded, batched, packed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import numpy as np
import torch

from epmq.data.chats import render, template_of, try_template
from epmq.data.examples import Examples
from epmq.data.pictures import as_list, conversation, open_picture, pictures_in, placeholder_ids, placeholders
from epmq.data.processors import PartProcessor, image_processor_of, tokenizer_of
from epmq.data.windows import join_words
from epmq.errors import InputError, error_context

# Tokens of a window where neither the recipe nor the tokenizer asks for fewer.
WINDOW = 512
REFUSAL = "the base model's {} cannot take them"


def text_length(tokenizer: Any, asked: int | None, positions: int | None) -> int | None:
    """Tokens to cut a text to: what is asked for, else what the tokenizer says, but no more than there are positions.

    None leaves it to the tokenizer.
    """
    return asked if positions is None else min(positions, asked or tokenizer.model_max_length)


def encode(
    examples: Examples, processor: Any, batch_size: int = 32, max_length: int | None = None
) -> Iterator[dict[str, Any]]:
    """Model inputs, batch by batch, in the order of the examples.

    Args:
        examples: what to encode. Documents (`causal`) are taken one by one, each cut; see `pack` for windows.
        processor: the tokenizer, the image processor or both in one.
        max_length: texts are cut to this many tokens, or to what `examples.longest` says where that is less; None
            leaves it to the tokenizer.

    Yields:
        keyword arguments of the model's forward: `input_ids` and `attention_mask` [batch, tokens] int64,
        `pixel_values` [batch, 3, height, width] float32, `labels` and `decoder_attention_mask` [batch, targets]
        (teacher forcing: the decoder's inputs are the labels moved to the right, and so is its mask).

    Raises:
        ValueError: the processor does not fit the kind of data.
    """
    if examples.kind == "batches":
        yield from examples.inputs
        return
    tokenizer, images = tokenizer_of(processor), image_processor_of(processor)
    without_images = images is None and examples.kind.startswith("image")
    if without_images or (tokenizer is None and examples.kind not in ("image", "tokens")):
        missing = "image processor" if without_images else "tokenizer"
        raise InputError(f"{examples.kind} examples need the base model's {missing}, found {type(processor).__name__}")
    if len(examples) and (examples.kind == "chat" or shows_by_template(examples.kind, processor)):
        messages = examples.inputs[0] if examples.kind == "chat" else _shown(examples.inputs[0])
        try_template(processor, messages, examples.template)
    for start, stop in _chunks(examples, batch_size):
        chunk = examples.take(np.arange(start, stop))
        with error_context(f"{examples.kind} examples", REFUSAL.format(type(processor).__name__)):
            batch = _encode(chunk, processor, max_length)
        yield batch


def _chunks(examples: Examples, size: int) -> Iterator[tuple[int, int]]:
    """Where batches begin and end: those with pictures and those without are apart."""
    pictured = [bool(pictures_in(one)) for one in examples.inputs] if examples.kind in ("chat", "image_text") else []
    start = 0
    while start < len(examples):
        stop = min(start + size, len(examples))
        if pictured:
            stop = next((at for at in range(start, stop) if pictured[at] != pictured[start]), stop)
        yield start, stop
        start = stop


def shows_by_template(kind: str, processor: Any) -> bool:
    """Whether a text with a picture is what a user says: where a joint processor has a template for conversations."""
    return kind == "image_text" and bool(placeholders(processor)) and template_of(processor) is not None


def _encode(examples: Examples, processor: Any, max_length: int | None) -> dict[str, Any]:
    """One batch of model inputs, of all the examples."""
    kind, inputs, batch = examples.kind, examples.inputs, dict[str, Any]()
    if kind == "tokens":
        ids = torch.from_numpy(inputs)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "image":
        pictures = [open_picture(picture) for picture in inputs]
        return {"pixel_values": image_processor_of(processor)(pictures, return_tensors="pt")["pixel_values"]}
    tokenizer = tokenizer_of(processor)
    text, target = (text_length(tokenizer, max_length, positions) for positions in examples.longest)
    form = {"padding": True, "truncation": "only_second" if kind == "question" else True, "return_tensors": "pt"}
    with _padding(tokenizer):
        if placeholders(processor) and kind in ("chat", "image_text"):
            return _encode_shown(processor, examples, {**form, "truncation": False}, text)
        if kind == "chat":
            chat = {"chat_template": examples.template, "tokenize": True, "return_dict": True}
            return dict(tokenizer.apply_chat_template(list(inputs), max_length=text, **form, **chat))
        if kind == "image_text":
            pictures = [_only(picture) for picture, _ in inputs]
            return _encode_both(processor, pictures, [words for _, words in inputs], {**form, "max_length": text})
        if kind == "words":
            inputs = [join_words(words)[0] for words in inputs]
        if kind == "choices":  # each choice with its text is an example of its own
            inputs = [(beginning, choice) for beginning, choices in inputs for choice in choices]
        # Pairs go in as lists, which is what tokenizers take for a pair.
        batch |= tokenizer([x if isinstance(x, str) else list(x) for x in inputs], max_length=text, **form)
        if kind == "seq2seq":
            targets = tokenizer(text_target=examples.targets, max_length=target, **form)
            mask = targets["attention_mask"]
            batch["labels"] = targets["input_ids"].masked_fill(mask == 0, -100)
            batch["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return batch


def _only(pictures: Any) -> Any:
    """The one picture of a text."""
    listed = as_list(pictures)
    if len(listed) != 1:
        raise InputError(f"each text takes one picture, and one has {len(listed)}")
    return open_picture(listed[0])


def _encode_both(processor: Any, pictures: list[Any], texts: list[str], form: dict[str, Any]) -> dict[str, Any]:
    """Pictures with their texts: by the joint processor, which knows what of one goes into the other."""
    if isinstance(processor, PartProcessor):
        raise InputError(processor.fault)
    if not callable(processor):  # two that know nothing of each other
        pixels = image_processor_of(processor)(pictures, return_tensors="pt")["pixel_values"]
        return {**tokenizer_of(processor)(texts, **form), "pixel_values": pixels}
    form = {name: value for name, value in form.items() if value is not None}
    try:
        return dict(processor(images=pictures, text=texts, **form))
    except (ValueError, TypeError, IndexError) as error:
        with suppress(Exception):  # some want a list of pictures for each text, others one list
            nested = [picture if isinstance(picture, list) else [picture] for picture in pictures]
            images = nested if nested != pictures else list(chain.from_iterable(nested))
            return dict(processor(images=images, text=texts, **form))
        raise error


def _shown(example: Any) -> Any:
    """A text with its pictures as what a user says who shows them."""
    return conversation(as_list(example[0]), example[1])


def _encode_shown(processor: Any, examples: Examples, form: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """Conversations, or texts with pictures, by a joint processor that has tokens for what is no text.

    A text that does not say where its pictures are is what a user says who shows them, where there is a template.
    """
    if isinstance(processor, PartProcessor):
        raise InputError(processor.fault)
    tokenizer, texts = tokenizer_of(processor), list[str]()
    templated = examples.kind == "chat" or shows_by_template(examples.kind, processor)
    for one in examples.inputs:
        plain = examples.kind != "chat" and any(token in one[1] for token in placeholders(processor))
        messages = one if examples.kind == "chat" else _shown(one)
        texts.append(render(processor, messages, examples.template) if templated and not plain else one[1])
    if tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token):
        form = {**form, "add_special_tokens": False}
    pictures = [[open_picture(picture) for picture in pictures_in(one)] for one in examples.inputs]
    if any(pictures):
        batch = _encode_both(processor, pictures, texts, form)
    else:
        batch = dict(processor(text=texts, **form))
    return _cut(batch, longest or tokenizer.model_max_length, processor)


def _cut(batch: dict[str, Any], longest: int, processor: Any) -> dict[str, Any]:
    """A batch of texts cut to so many tokens; a picture whose tokens are not all left is an error."""
    ids = batch.pop("input_ids")
    width = ids.shape[1]
    if width > longest:
        lost = torch.isin(ids[:, longest:], torch.tensor(placeholder_ids(processor), dtype=ids.dtype))
        if bool(lost.any()):
            raise InputError(f"pictures take more than the {longest} tokens that texts are cut to")
        long = [name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim == 2]
        long = [name for name in long if batch[name].shape == ids.shape and not batch[name].is_floating_point()]
        batch |= {name: batch[name][:, :longest] for name in long}
    return {"input_ids": ids[:, :longest], **batch}


@contextmanager
def _padding(tokenizer: Any) -> Iterator[None]:
    """Pad with any token, in a `with` block, where the tokenizer names none: padding is masked out."""
    missing = tokenizer.pad_token_id is None
    if missing:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    try:
        yield
    finally:
        if missing:
            tokenizer.pad_token = None


def pack(examples: Examples, processor: Any, length: int | None, count: int | None, seed: int) -> Examples:
    """Put documents end to end, with the end-of-text token between them, and cut them into windows.

    Args:
        examples: documents, of kind `causal`.
        processor: the tokenizer.
        length: tokens a window; None means what the tokenizer allows, at most 512.
        count: windows wanted, from documents in an order of that seed; None makes all windows, in order.

    Returns:
        examples of kind `tokens`, [windows, length] int64; what is left at the end is dropped.

    Raises:
        ValueError: there is no tokenizer, or not enough text for one window.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        raise InputError(f"texts need the base model's tokenizer, found {type(processor).__name__}")
    length = length or min(tokenizer.model_max_length, WINDOW)
    order = np.arange(len(examples)) if count is None else np.random.default_rng(seed).permutation(len(examples))
    end, parts, total = tokenizer.eos_token_id, [], 0
    for start in range(0, len(order), 256):
        if count is not None and total >= count * length:
            break
        with error_context("texts", REFUSAL.format(type(processor).__name__)):
            encoded = tokenizer([examples.inputs[i] for i in order[start : start + 256]])["input_ids"]
        for part in encoded:
            parts.append(part if end is None or (part and part[-1] == end) else [*part, end])
            total += len(parts[-1])
    windows = total // length if count is None else min(count, total // length)
    if windows == 0:
        raise InputError(f"the texts have {total} tokens in all, which is not one window of {length}")
    ids = np.fromiter(chain.from_iterable(parts), dtype=np.int64, count=windows * length)
    return Examples("tokens", ids.reshape(windows, length))


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def split_first(batches: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same examples, the first `count` in a batch of their own: what is tried on the first batch costs little.

    Unless the first batch is nothing but tensors that agree in their first dimension, all stay as they are.
    """
    first = batches[0] if batches else {}
    sizes = {len(value) if isinstance(value, torch.Tensor) and value.ndim else 0 for value in first.values()}
    if len(sizes) != 1 or not sizes.pop() > count:
        return batches
    head, tail = ({name: value[part] for name, value in first.items()} for part in (slice(count), slice(count, None)))
    return [head, tail, *batches[1:]]
