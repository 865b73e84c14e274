"""From examples to model inputs: tokenizers, processors of images, chat templates, packing."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from epmq.data.examples import Examples
from epmq.data.windows import join_words
from epmq.errors import InputError, error_context, reason

# Files of which one shows that there is a processor of images or audio, or a tokenizer.
SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tekken.json", "bpe.codes")
TEXT_ENDINGS = (".model", ".spm", ".tiktoken", ".tokenizer")
# Tokens of a window where neither the recipe nor the tokenizer asks for fewer.
WINDOW = 512
# Far longer than a chat template needs for one conversation.
TEMPLATE_SECONDS = 3
# Of a number in a chat template.
MOST_DIGITS = 6
REFUSAL = "the base model's {} cannot take them"


class PartProcessor:
    """Tokenizer and image processor of a joint processor that cannot be opened here as a whole; `fault` says why."""

    def __init__(self, tokenizer: Any, image_processor: Any, fault: str) -> None:
        self.tokenizer, self.image_processor, self.fault = tokenizer, image_processor, fault


def load_processor(directory: str | Path) -> Any:
    """What lies in a model directory: a tokenizer, a processor of images or audio, both in one (CLIP), or None.

    Where transformers cannot open it, or not without code that lies there, a ValueError names the directory; likewise
    where the tokenizer knows no word, since its vocabulary is not there.
    """
    from transformers import AutoTokenizer

    names = [file.name for file in Path(directory).iterdir()] if Path(directory).is_dir() else []
    texts = any(name in TEXT_FILES or name.endswith(TEXT_ENDINGS) for name in names)
    settings = any(name in SETTINGS_FILES for name in names)
    if not settings and not texts:
        return None
    fault = "transformers cannot open the tokenizer or the processor"
    with warnings.catch_warnings(), error_context(directory, fault):
        warnings.simplefilter("ignore")
        if not texts:  # transformers would make up a tokenizer without words
            processor = _first_opened(directory)
        elif not settings:
            # Without a value, transformers asks on standard input whether code in the directory may run.
            processor = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        else:
            processor = _open_joint(directory)
    tokenizer = tokenizer_of(processor)
    if tokenizer is not None and len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(f"{directory}: its tokenizer has no words: the file of its vocabulary is missing")
    return processor


def _open_joint(directory: str | Path) -> Any:
    """The processor of a directory that has a tokenizer and the settings of another part."""
    from transformers import AutoProcessor, AutoTokenizer

    try:
        processor: Any = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    except ImportError as error:  # a part, such as that for videos, needs a library that is not here
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        with suppress(Exception):
            return PartProcessor(tokenizer, _first_opened(directory), reason(error))
        return PartProcessor(tokenizer, None, reason(error))
    if tokenizer_of(processor) is processor:
        # A vision tower alone is no processor's model: beside its tokenizer's files, transformers sees those only.
        return _first_opened(directory)
    return processor


def _first_opened(directory: str | Path) -> Any:
    """The image processor of a directory; where it has none, its feature extractor, as for audio."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    kinds: list[Any] = [AutoImageProcessor, AutoFeatureExtractor]
    faults: list[Exception] = []
    for kind in kinds:
        try:
            return kind.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # of damaged files libraries raise anything
            faults.append(error)
    raise faults[0]


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


def fit_to_model(processor: Any, forward: Callable[..., Any]) -> None:
    """Let a tokenizer give no inputs that a model's forward has no name for, such as types of tokens."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return
    taken = inspect.signature(forward).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    kept = {"input_ids", *taken, *(["attention_mask"] if is_open else [])}
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in kept]


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
    if examples.kind == "chat" and len(examples):
        try_template(tokenizer, examples.inputs[0], examples.template)
    for start in range(0, len(examples), batch_size):
        chunk = examples.take(np.arange(start, min(start + batch_size, len(examples))))
        with error_context(f"{examples.kind} examples", REFUSAL.format(type(processor).__name__)):
            batch = _encode(chunk, processor, max_length)
        yield batch


def try_template(tokenizer: Any, messages: Any, template: str | None = None) -> None:
    """Refuse a chat template that fails or comes to no end: it is a program that came with the model."""
    error: BaseException | None = TimeoutError(f"no end within {TEMPLATE_SECONDS} s")

    def render() -> None:
        nonlocal error
        try:
            tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            error = None
        except BaseException as raised:
            error = raised

    with error_context(tokenizer.name_or_path, "its chat template cannot be used"):
        check_template(template or tokenizer.get_chat_template())
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


def _encode(examples: Examples, processor: Any, max_length: int | None) -> dict[str, Any]:
    """One batch of model inputs, of all the examples."""
    kind, inputs, batch = examples.kind, examples.inputs, dict[str, Any]()
    if kind == "tokens":
        ids = torch.from_numpy(inputs)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "image":
        pictures = [_image(picture) for picture in inputs]
        return {"pixel_values": image_processor_of(processor)(pictures, return_tensors="pt")["pixel_values"]}
    tokenizer = tokenizer_of(processor)
    text, target = (text_length(tokenizer, max_length, positions) for positions in examples.longest)
    form = {"padding": True, "truncation": "only_second" if kind == "question" else True, "return_tensors": "pt"}
    with _padding(tokenizer):
        if kind == "chat":
            chat = {"chat_template": examples.template, "tokenize": True, "return_dict": True}
            return dict(tokenizer.apply_chat_template(list(inputs), max_length=text, **form, **chat))
        if kind == "image_text":
            pictures = [_image(picture) for picture, _ in inputs]
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
        with suppress(Exception):  # some want a list of pictures for each text
            return dict(processor(images=[[picture] for picture in pictures], text=texts, **form))
        raise error


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
