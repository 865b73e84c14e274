"""From examples to model inputs: tokenizers, image processors, chat templates, packing."""

import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from epmq.data.examples import Examples
from epmq.data.windows import join_words
from epmq.errors import InputError, error_context

# Files of which one shows that there is an image processor, or a tokenizer.
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
# Tokens of a window where neither the recipe nor the tokenizer asks for fewer.
WINDOW = 512
# Far longer than a chat template needs for one conversation.
TEMPLATE_SECONDS = 3
# Of a number in a chat template.
MOST_DIGITS = 6
REFUSAL = "the base model's {} cannot take them"


def load_processor(directory: str | Path) -> Any:
    """What lies in a model directory: a tokenizer, an image processor, both in one (CLIP), or None.

    Where transformers cannot open it, or not without code that lies there, a ValueError names the directory.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    images, texts = (any(Path(directory, name).exists() for name in names) for names in (IMAGE_FILES, TEXT_FILES))
    if not images and not texts:
        return None
    image_class: Any = AutoImageProcessor
    processor_class: Any = AutoTokenizer if not images else AutoProcessor if texts else image_class
    fault = "transformers cannot open the tokenizer or image processor"
    with warnings.catch_warnings(), error_context(directory, fault):
        warnings.simplefilter("ignore")
        # Without a value, transformers asks on standard input whether code in the directory may run.
        processor = processor_class.from_pretrained(directory, trust_remote_code=False)
        if images and image_processor_of(processor) is None:
            # A vision tower alone is no processor's model: beside its tokenizer's files, transformers sees those only.
            processor = image_class.from_pretrained(directory, trust_remote_code=False)
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer in a processor; None if there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders often come without; padding is masked out anyway
    tokenizer.padding_side = "right"  # whatever it was to generate with: positions count from the first token
    return tokenizer


def image_processor_of(processor: Any) -> Any:
    """The image processor in a processor; None if there is none."""
    images = getattr(processor, "image_processor", processor)
    return images if hasattr(images, "image_mean") or hasattr(images, "do_resize") else None


def encode(
    examples: Examples, processor: Any, batch_size: int = 32, max_length: int | None = None
) -> Iterator[dict[str, Any]]:
    """Model inputs, batch by batch, in the order of the examples.

    Args:
        examples: what to encode. Documents (`causal`) are taken one by one, each cut; see `pack` for windows.
        processor: the tokenizer, the image processor or both in one.
        max_length: texts are cut to this many tokens; None leaves it to the tokenizer.

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
    if examples.kind == "chat" and len(examples):
        try_template(tokenizer, examples.inputs[0])
    for start in range(0, len(examples), batch_size):
        chunk = examples.take(np.arange(start, min(start + batch_size, len(examples))))
        with error_context(f"{examples.kind} examples", REFUSAL.format(type(processor).__name__)):
            batch = _encode(chunk, tokenizer, images, max_length)
        yield batch


def try_template(tokenizer: Any, messages: Any) -> None:
    """Refuse a chat template that fails or comes to no end: it is a program that came with the model."""
    error: BaseException | None = TimeoutError(f"no end within {TEMPLATE_SECONDS} s")

    def render() -> None:
        nonlocal error
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
            error = None
        except BaseException as raised:
            error = raised

    with error_context(tokenizer.name_or_path, "its chat template cannot be used"):
        check_template(tokenizer.get_chat_template())
        # A thread cannot be stopped, but this one does not keep the process from ending.
        thread = Thread(target=render, daemon=True)
        thread.start()
        thread.join(TEMPLATE_SECONDS)
        if error is not None:
            raise error


def check_template(template: str) -> None:
    """Refuse a chat template that computes with numbers so large that it would fill the memory in one step.

    One such step cannot be interrupted, so that a limit of time does not help.
    """
    from jinja2 import Environment

    for _, kind, value in Environment().lex(template):
        if (kind, value) == ("operator", "**") or (kind == "integer" and len(value) > MOST_DIGITS):
            raise InputError(f"it computes with large numbers: {value}")


def _encode(examples: Examples, tokenizer: Any, images: Any, max_length: int | None) -> dict[str, Any]:
    """One batch of model inputs, of all the examples."""
    kind, inputs, batch = examples.kind, examples.inputs, dict[str, Any]()
    if kind == "tokens":
        ids = torch.from_numpy(inputs)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cut = {
        "padding": True,
        "truncation": "only_second" if kind == "question" else True,
        "max_length": max_length,
        "return_tensors": "pt",
    }
    if kind == "chat":
        return dict(tokenizer.apply_chat_template(list(inputs), tokenize=True, return_dict=True, **cut))
    if kind.startswith("image"):
        pictures, inputs = (inputs, None) if kind == "image" else zip(*inputs)
        batch["pixel_values"] = images([_image(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    if kind == "words":
        inputs = [join_words(words)[0] for words in inputs]
    if kind == "choices":  # each choice with its text is an example of its own
        inputs = [(text, choice) for text, choices in inputs for choice in choices]
    if inputs is not None:
        # Pairs go in as lists, which is what tokenizers take for a pair.
        batch |= tokenizer([x if isinstance(x, str) else list(x) for x in inputs], **cut)
    if kind == "seq2seq":
        targets = tokenizer(text_target=examples.targets, **cut)
        mask = targets["attention_mask"]
        batch["labels"] = targets["input_ids"].masked_fill(mask == 0, -100)
        batch["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return batch


def _image(source: Any) -> Any:
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
