"""Whether two processors give the same inputs: that of a base, and that which its output will have."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import SETTINGS_FILES, image_processor_of, load_processor, tokenizer_of
from epmq.errors import InputError

# Scripts, numbers, spaces, code, rare characters: each way of cutting texts has one that it alone cuts as it does.
TEXTS = (
    "The cat sat on the mat.",
    "don't  STOP,\tit's 3.14 or 1,000,000!\n\n  ",
    "def f(x): return x**2  # naïve café – “quoted” ½",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا नमस्ते",
    "🙂👩‍👩‍👧 \u200b\ufeff e\u0301 ﬁ Ⅷ",
    "<s> </s> <pad> <mask> [CLS] [SEP] [MASK] <|endoftext|> <|im_start|>user",
    "",
)
# Examples of a run that are compared as well.
COMPARED = 4


def difference(one: Any, other: Any, shared: bool = False, kinds: Iterable[str] | None = None) -> str | None:
    """What two processors do not do alike, in a word; None where they do the same.

    Args:
        shared: what only one of them does is no difference.
        kinds: those of `ANSWERS` that are compared; by default all.
    """
    for what in ANSWERS if kinds is None else kinds:
        mine, theirs = (_answer(ANSWERS[what], processor) for processor in (one, other))
        if not same(mine, theirs) and not (shared and (mine is None or theirs is None)):
            return what
    return None


def differs_in_media(one: Any, folder: Path) -> str | None:
    """As `difference` from the processor in a folder, of pictures and sounds alone; None where it has none for them."""
    if one is None or not any((folder / name).exists() for name in SETTINGS_FILES):
        return None
    try:
        other = load_processor(folder)
    except InputError:  # it is not used
        return None
    return difference(one, other, shared=True, kinds=("pictures", "sounds"))


def encodes_alike(one: Any, other: Any, examples: Examples, max_length: int | None) -> bool:
    """Whether two processors make the same inputs of the first few examples."""
    few = examples.take(np.arange(min(len(examples), COMPARED)))
    return same(*(list(encode(few, processor, COMPARED, max_length)) for processor in (one, other)))


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors and arrays in every entry."""
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return isinstance(other, type(one)) and one.shape == other.shape and bool(np.all(np.asarray(one == other)))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _answer(answers: Callable[[Any], Any], processor: Any) -> Any:
    try:
        return answers(processor)
    except Exception as error:  # what one refuses, the other must refuse as well
        return type(error).__name__


def _tokens(processor: Any) -> Any:
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return None
    # Some are longer than some models take, which is no matter here.
    return [(ids := tokenizer(text, verbose=False)["input_ids"], tokenizer.decode(ids)) for text in TEXTS]


def _settings(processor: Any) -> Any:
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return None
    templates = [getattr(part, "chat_template", None) for part in (tokenizer, processor)]
    return [tokenizer.model_max_length, tokenizer.special_tokens_map, tokenizer.truncation_side, templates]


def _pixels(processor: Any) -> Any:
    images = image_processor_of(processor)
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), dtype=np.uint8))
    return None if images is None else dict(images(pictures, return_tensors="pt"))


def _audio(processor: Any) -> Any:
    features = getattr(processor, "feature_extractor", processor)
    rate = getattr(features, "sampling_rate", None)
    if rate is None or tokenizer_of(features) is features:
        return None
    wave = np.sin(np.arange(rate // 4) / 7).astype(np.float32)
    return dict(features(wave, sampling_rate=rate, return_tensors="np"))


ANSWERS: dict[str, Callable[[Any], Any]] = {
    "texts": _tokens,
    "the settings of the tokenizer": _settings,
    "pictures": _pixels,
    "sounds": _audio,
}
