"""Examples on disk and batches in memory: what calibration and evaluation feed to a model.

Three forms are read: `.jsonl` (one object a line with a text and, for evaluation, a label), `.npz` (arrays
`images` [n, height, width, 3] uint8 and `labels` [n] integers; never unpickled) and a folder of images with one
sub-folder a class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Examples:
    """Inputs and labels of one split of one task.

    Attributes:
        kind: `text` or `image`.
        inputs: n strings, or n images: one uint8 array [n, height, width, 3] or a list of file paths.
        labels: class index of each example, int64 [n], or None where the source has none.
    """

    kind: str
    inputs: Any
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: np.ndarray) -> Examples:
        """The examples at the positions `index`, in that order."""
        if isinstance(self.inputs, np.ndarray):
            inputs: Any = self.inputs[index]
        else:
            inputs = [self.inputs[i] for i in index]
        return Examples(self.kind, inputs, None if self.labels is None else self.labels[index])

    def draw(self, count: int | None, seed: int) -> Examples:
        """A seeded draw of `count` examples without replacement; all of them, in order, if `count` is None."""
        if count is None or count >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[:count]))


def read_examples(path: str | Path, text: str = "text", label: str = "label") -> Examples:
    """Read one split.

    Args:
        path: a `.jsonl` file, a `.npz` file or a folder of images.
        text, label: names of the fields in a `.jsonl` file.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the content is not of the form above, or there are no examples; file and line are named.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    if path.is_dir():
        examples = _read_image_folder(path)
    elif path.suffix == ".npz":
        examples = _read_npz(path)
    elif path.suffix == ".jsonl":
        examples = _read_jsonl(path, text, label)
    else:
        raise ValueError(f"{path}: expected a .jsonl file, a .npz file or a folder of images")
    if len(examples) == 0:
        raise ValueError(f"{path}: holds no examples")
    return examples


def _read_jsonl(path: Path, text: str, label: str) -> Examples:
    texts: list[str] = []
    labels: list[int] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict) or not isinstance(row.get(text), str):
                raise ValueError(f"{path}, line {number}: no text field {text!r}")
            texts.append(row[text])
            if label in row:
                if not isinstance(row[label], int):
                    raise ValueError(f"{path}, line {number}: field {label!r} must be a class index (an integer)")
                labels.append(row[label])
    if labels and len(labels) != len(texts):
        raise ValueError(f"{path}: only {len(labels)} of {len(texts)} lines have the field {label!r}")
    return Examples("text", texts, np.asarray(labels, dtype=np.int64) if labels else None)


def _read_npz(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("images", "labels") if name in file}
    except (OSError, ValueError, EOFError, TypeError, BadZipFile) as error:
        raise ValueError(f"{path}: not a plain .npz file ({error})") from None
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{path}: needs an array 'images', uint8 [n, height, width, 3]")
    labels = arrays.get("labels")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: {len(images)} images but labels of shape {list(labels.shape)}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels of dtype {labels.dtype}, but they must be integers")
    return Examples("image", images, None if labels is None else labels.astype(np.int64))


def _read_image_folder(path: Path) -> Examples:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if classes:
        pairs = [(file, k) for k, name in enumerate(classes) for file in sorted((path / name).rglob("*"))]
    else:
        pairs = [(file, 0) for file in sorted(path.iterdir())]
    pairs = [(file, k) for file, k in pairs if file.suffix.lower() in IMAGE_ENDINGS]
    labels = np.asarray([k for _, k in pairs], dtype=np.int64) if classes else None
    return Examples("image", [file for file, _ in pairs], labels)


def load_processor(directory: str | Path) -> Any:
    """The tokenizer or image processor that lies in a model directory, or None where there is neither."""
    import warnings

    from transformers import AutoImageProcessor, AutoTokenizer

    directory = Path(directory)
    if (directory / "preprocessor_config.json").exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoImageProcessor.from_pretrained(directory)
    if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return AutoTokenizer.from_pretrained(directory)
    return None


def encode(
    examples: Examples, processor: Any, batch_size: int = 32, max_length: int | None = None
) -> Iterator[dict[str, Any]]:
    """Batches of model inputs, in the order of the examples.

    Args:
        examples: what to feed.
        processor: a tokenizer for texts, an image processor for images (see `load_processor`).
        batch_size: samples a batch.
        max_length: texts are cut to this many tokens; None leaves it to the tokenizer.

    Yields:
        keyword arguments of the model's forward: `input_ids` and `attention_mask` [batch, tokens] int64, or
        `pixel_values` [batch, 3, height, width] float32.

    Raises:
        ValueError: the processor does not fit the kind of data.
    """
    wanted = "tokenizer" if examples.kind == "text" else "image processor"
    is_tokenizer = hasattr(processor, "convert_ids_to_tokens")
    if processor is None or is_tokenizer != (examples.kind == "text"):
        raise ValueError(f"{examples.kind} examples need the base model's {wanted}, found {type(processor).__name__}")
    for start in range(0, len(examples), batch_size):
        chunk = examples.inputs[start : start + batch_size]
        if examples.kind == "text":
            yield dict(processor(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))
        else:
            yield {"pixel_values": processor([_image(x) for x in chunk], return_tensors="pt")["pixel_values"]}


def _image(source: Any) -> Any:
    if isinstance(source, np.ndarray):
        return source
    from PIL import Image

    with Image.open(source) as image:
        return image.convert("RGB")
