"""Examples from files, from the `datasets` library or from Python objects.

Tables are read row by row: `.jsonl` (one object a line), `.csv` (with a header), `.parquet`, a name or folder that
`datasets` knows, or any iterable of dicts. What a row holds decides what it is: chat messages, an image (with a text:
a pair for CLIP), a text with a target (for encoder–decoders), a text or a pair of texts. Two more forms hold images:
`.npz` (arrays `images` [n, height, width, 3] uint8 and `labels` [n] integers; never unpickled) and a folder of images
with one sub-folder a class.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq.data.examples import Examples, Fields, Pictures, draw_index
from epmq.errors import InputError, MissingError, error_context, reason
from epmq.recipe import Data

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def fields_of(data: Data | None) -> Fields:
    """The columns that a recipe's data names; the usual ones where there is none."""
    if data is None:
        return Fields()
    columns: dict[str, Any] = {field.name: getattr(data, field.name) for field in dataclasses.fields(Fields)}
    columns |= {name: tuple(value) for name, value in columns.items() if isinstance(value, list)}
    return Fields(**columns)


def read_data(data: Data, use: str, count: int | None, seed: int) -> Examples:
    """The examples that a recipe names; arguments and errors as in `read_dataset` and `read_examples`."""
    if data.dataset is not None:
        return read_dataset(data.dataset, data.subset, data.split or "train", fields_of(data), use, count, seed)
    assert data.path is not None
    return read_examples(data.path, fields_of(data), use)


def read_examples(path: str | Path, fields: Fields | None = None, use: str = "text") -> Examples:
    """Read one split from a file or a folder of images.

    Args:
        path: a `.jsonl`, `.csv`, `.parquet` or `.npz` file, or a folder of images.
        use: one of `USES`: what the model makes of texts.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the content is not of the form above, or there are no examples; file and line are named.
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"{path}: no such data file or folder")
    if path.is_dir():
        examples = _read_image_folder(path)
    elif path.suffix == ".npz":
        examples = _read_npz(path)
    elif path.suffix in TABLES:
        examples = from_rows(TABLES[path.suffix](path), fields or Fields(), use, str(path))
        if examples.kind in ("image", "image_text"):
            examples = _locate_images(examples, path.parent)
    else:
        raise InputError(f"{path}: expected a {', '.join(TABLES)} or .npz file, or a folder of images")
    if len(examples) == 0:
        raise InputError(f"{path}: holds no examples")
    return examples


def read_dataset(
    name: str, subset: str | None, split: str, fields: Fields, use: str, count: int | None, seed: int
) -> Examples:
    """Read a split with the `datasets` library (extra `data`); `fields` and `use` as in `read_examples`.

    Args:
        name: a Hub id or a local folder.
        subset: name of one of its configurations.
        count: where given, only a seeded draw of that many rows (more for a language model) is read.

    Raises:
        FileNotFoundError: `datasets` cannot open it.
        ValueError: the library is missing, there are no rows, or they are not of a known form.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"dataset {name}: needs the datasets library (pip install 'epmq[data]')") from None
    source = f"dataset {'/'.join(part for part in (name, subset, split) if part)}"
    try:
        rows: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever the library and its file systems raise
        raise MissingError(f"{source}: datasets cannot open it ({reason(error)})") from None
    if count is not None:
        rows = rows.select(draw_index(len(rows), count if use != "causal" else 20 * count, seed))
    if len(rows) == 0:
        raise InputError(f"{source}: holds no examples")
    if isinstance(rows.features.get(fields.image), datasets.Image) and fields.text not in rows.features:
        return _read_pictures(rows, fields, source)
    return from_rows(((f"row {i}", row) for i, row in enumerate(rows)), fields, use, source)


def _read_pictures(rows: Any, fields: Fields, source: str) -> Examples:
    """The pictures of a dataset and their classes; a column of booleans is one of two classes."""
    if fields.label not in rows.features:
        return Examples("image", Pictures(rows, fields.image))
    classes = list(rows.select_columns(fields.label)[fields.label])
    if getattr(rows.features[fields.label], "dtype", None) == "bool":
        classes = [int(value) for value in classes]
    labels = [_label(value, fields.label, f"{source}, row {i}") for i, value in enumerate(classes)]
    return Examples("image", Pictures(rows, fields.image), np.asarray(labels, dtype=np.int64))


def from_objects(items: Iterable[Any], fields: Fields, use: str, source: str) -> Examples:
    """Examples from Python objects: rows as dicts, or ready batches (dicts with tensors), as from a data loader.

    Errors are those of `from_rows`; none at all is one, too.
    """
    items = list(items)
    if items and all(isinstance(item, Mapping) and any(map(torch.is_tensor, item.values())) for item in items):
        return Examples("batches", [dict(item) for item in items])
    if not items:
        raise InputError(f"{source}: holds no examples")
    return from_rows(((f"item {i}", row) for i, row in enumerate(items)), fields, use, source)


def from_rows(rows: Iterable[tuple[str, Any]], fields: Fields, use: str, source: str) -> Examples:
    """Examples from rows, each with what to call it in an error, such as `line 3`; `source` goes in front of that.

    Raises:
        ValueError: a row lacks a field, or holds something else in it; it is named.
    """
    kind, inputs, targets, labels = "", list[Any](), list[str](), list[int]()
    for where, row in rows:
        where = f"{source}, {where}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: no text field {fields.text!r} (not an object with named fields)")
        if fields.messages in row:
            kind = kind or "chat"
        elif fields.image in row:
            kind = kind or ("image_text" if fields.text in row else "image")
        kind = kind or use
        inputs.append(_input(row, kind, fields, where))
        if kind == "seq2seq":
            targets.append(_target(row, fields, where))
        if fields.label in row and kind in ("text", "image"):
            labels.append(_label(row[fields.label], fields.label, where))
    if labels and len(labels) != len(inputs):
        raise InputError(f"{source}: only {len(labels)} of {len(inputs)} lines have the field {fields.label!r}")
    classes = np.asarray(labels, dtype=np.int64) if labels else None
    return Examples(kind or "text", inputs, classes, targets if kind == "seq2seq" else None)


def _input(row: Mapping[str, Any], kind: str, fields: Fields, where: str) -> Any:
    if kind == "chat":
        return _messages(row.get(fields.messages), fields.messages, where)
    if kind in ("image", "image_text"):
        image = row.get(fields.image)
        if image is None:
            raise InputError(f"{where}: no image field {fields.image!r}")
        return image if kind == "image" else (image, _string(row, str(fields.text), where, "text"))
    if fields.prompt is not None:
        return _filled(fields.prompt, row, where)
    if isinstance(fields.text, str):
        return _string(row, fields.text, where, "text")
    first, second = fields.text
    return _string(row, first, where, "text"), _string(row, second, where, "text")


def _target(row: Mapping[str, Any], fields: Fields, where: str) -> str:
    if fields.answer is not None:
        return _filled(fields.answer, row, where)
    if fields.answers is None:
        return _string(row, fields.target, where, "target")
    label = _label(row.get(fields.label), fields.label, where)
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


def _label(value: Any, field: str, where: str) -> int:
    if isinstance(value, str):  # csv knows nothing else
        with suppress(ValueError):
            value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{where}: field {field!r} must be a class index (an integer)")
    if not -(2**63) <= value < 2**63:
        raise InputError(f"{where}: field {field!r} is {value:.3g}, which is no class index")
    return int(value)


def _messages(value: Any, field: str, where: str) -> list[dict[str, str]]:
    good = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
    if not good or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value):
        raise InputError(f"{where}: field {field!r} must be a list of messages with 'role' and 'content'")
    return [{key: _whole(str(m[key]), field, where) for key in ("role", "content")} for m in value]


def _locate_images(examples: Examples, folder: Path) -> Examples:
    """Image paths in a file are relative to that file."""

    def locate(image: Any) -> Any:
        if not isinstance(image, str):
            return image
        if not (folder / image).is_file():
            raise InputError(f"{folder / image}: no such image")
        return folder / image

    inputs = [(locate(x[0]), x[1]) if examples.kind == "image_text" else locate(x) for x in examples.inputs]
    return dataclasses.replace(examples, inputs=inputs)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({reason(error)})") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise csv.Error("more values than the header has names")
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if value != ""}
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: needs pyarrow (pip install 'epmq[data]')") from None
    with error_context(path, "not a readable parquet file"):
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"row {number}", row


TABLES = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _read_npz(path: Path) -> Examples:
    with error_context(path, "not a plain .npz file"), np.load(path, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in ("images", "labels") if name in file}
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"{path}: needs an array 'images', uint8 [n, height, width, 3]")
    if len(images) and not images[0].size:
        raise InputError(f"{path}: 'images' of shape {list(images.shape)} have no pixels")
    labels = arrays.get("labels")
    if labels is not None and labels.shape != images.shape[:1]:
        raise InputError(f"{path}: {len(images)} images but labels of shape {list(labels.shape)}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise InputError(f"{path}: labels of dtype {labels.dtype}, but they must be integers")
    return Examples("image", images, None if labels is None else labels.astype(np.int64))


def _read_image_folder(path: Path) -> Examples:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    folders = [path / name for name in classes] or [path]
    pairs = [(file, k) for k, folder in enumerate(folders) for file in sorted(folder.rglob("*"))]
    pairs = [(file, k) for file, k in pairs if file.suffix.lower() in IMAGE_ENDINGS]
    labels = np.asarray([k for _, k in pairs], dtype=np.int64) if classes else None
    return Examples("image", [file for file, _ in pairs], labels)
