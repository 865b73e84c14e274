"""Processors of a model directory: tokenizers, processors of images or sounds, several of them in one."""

import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from epmq.errors import InputError, error_context, reason

# Files of which one shows that there is a processor of images or audio, or a tokenizer.
SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tekken.json", "bpe.codes")
TEXT_ENDINGS = (".model", ".spm", ".tiktoken", ".tokenizer")


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
