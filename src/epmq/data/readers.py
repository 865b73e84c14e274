"""Examples from files, from the `datasets` library or from Python objects.

Tables are read row by row: `.jsonl` (one object a line), `.csv` (with a header), `.parquet`, a name or folder that
`datasets` knows, or any iterable of dicts. What a row holds decides what it is: chat messages (which may show images),
an image (with a text: a pair), a text with a target (for encoder–decoders), a question with its context, a list of
words, a text with choices, a text or a pair of texts. Two more forms hold images: `.npz` (arrays `images` [n, height,
width, 3] uint8 and `labels` [n]; never unpickled) and a folder of images with one sub-folder a class.

Labels are read where they are asked for, and as what they are asked for (`epmq.data.labels.Labels`); where they are
not, whatever they are makes no difference.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq.data.examples import Examples, Fields, Pictures, draw_index
from epmq.data.labels import Labels
from epmq.data.pictures import map_pictures
from epmq.data.rows import INDICES, from_rows, read_label
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


def read_data(data: Data, use: str, count: int | None, seed: int, labels: Labels | None = INDICES) -> Examples:
    """The examples that a recipe names; arguments and errors as in `read_dataset` and `read_examples`."""
    if data.dataset is not None:
        split = data.split or "train"
        return read_dataset(data.dataset, data.subset, split, fields_of(data), use, count, seed, labels)
    assert data.path is not None
    return read_examples(data.path, fields_of(data), use, labels)


def read_examples(
    path: str | Path, fields: Fields | None = None, use: str = "text", labels: Labels | None = INDICES
) -> Examples:
    """Read one split from a file or a folder of images.

    Args:
        path: a `.jsonl`, `.csv`, `.parquet` or `.npz` file, or a folder of images.
        use: one of `USES`: what the model makes of texts.
        labels: what the labels are; None leaves them unread.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the content is not of the form above, or there are no examples; file and line are named.
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"{path}: no such data file or folder")
    if path.is_dir():
        examples = _read_image_folder(path, labels)
    elif path.suffix == ".npz":
        examples = _read_npz(path, labels)
    elif path.suffix in TABLES:
        examples = from_rows(TABLES[path.suffix](path), fields or Fields(), use, str(path), labels)
        if examples.kind in ("image", "image_text", "chat"):
            examples = _locate_images(examples, path.parent)
    else:
        raise InputError(f"{path}: expected a {', '.join(TABLES)} or .npz file, or a folder of images")
    if len(examples) == 0:
        raise InputError(f"{path}: holds no examples")
    return examples


def read_dataset(
    name: str,
    subset: str | None,
    split: str,
    fields: Fields,
    use: str,
    count: int | None,
    seed: int,
    labels: Labels | None = INDICES,
) -> Examples:
    """Read a split with the `datasets` library (extra `data`); `fields`, `use` and `labels` as in `read_examples`.

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
    renamed = _named_classes(rows.features, fields, labels)
    if isinstance(rows.features.get(fields.image), datasets.Image) and fields.text not in rows.features:
        return _read_pictures(rows, fields, source, labels, renamed)
    return from_rows(((f"row {i}", _renamed(row, renamed)) for i, row in enumerate(rows)), fields, use, source, labels)


def _named_classes(features: Any, fields: Fields, labels: Labels | None) -> dict[str, Callable[[Any], Any]]:
    """Column → what makes names of its class indices, where the head knows classes of such names.

    A data set may number its classes otherwise than the head that is scored on it.
    """
    renamed: dict[str, Callable[[Any], Any]] = {}
    for column in (fields.label, fields.tags) if labels is not None else ():
        feature = features.get(column) if isinstance(column, str) else None
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if labels is not None and names and labels.knows(names):
            renamed[str(column)] = partial(_names_of, list(names))
    return renamed


def _renamed(row: Any, renamed: Mapping[str, Callable[[Any], Any]]) -> Any:
    return {**row, **{column: names(row[column]) for column, names in renamed.items()}} if renamed else row


def _names_of(names: list[str], value: Any) -> Any:
    """Names in the place of class indices; anything else, such as the −1 of a class that is not told, as it is."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_names_of(names, one) for one in value]
    known = isinstance(value, (int, np.integer)) and 0 <= value < len(names)
    return names[int(value)] if known else value


def _read_pictures(rows: Any, fields: Fields, source: str, labels: Labels | None, renamed: Any) -> Examples:
    """The pictures of a dataset and their classes."""
    pictures, column = Pictures(rows, fields.image), fields.label
    if labels is None or not isinstance(column, str) or column not in rows.features:
        return Examples("image", pictures)
    values = list(rows.select_columns(column)[column])
    names = renamed.get(column, lambda value: value)
    read = [read_label({column: names(value)}, column, f"{source}, row {i}", labels) for i, value in enumerate(values)]
    return Examples("image", pictures, labels.array(read))


def from_objects(
    items: Iterable[Any], fields: Fields, use: str, source: str, labels: Labels | None = INDICES
) -> Examples:
    """Examples from Python objects: rows as dicts, or ready batches (dicts with tensors), as from a data loader.

    The labels of ready batches stay where they are. Errors are those of `from_rows`; none at all is one, too.
    """
    renamed = _named_classes(getattr(items, "features", None) or {}, fields, labels)
    items = list(items)
    if items and all(isinstance(item, Mapping) and any(map(torch.is_tensor, item.values())) for item in items):
        return Examples("batches", [dict(item) for item in items])
    if not items:
        raise InputError(f"{source}: holds no examples")
    return from_rows(
        ((f"item {i}", _renamed(row, renamed)) for i, row in enumerate(items)), fields, use, source, labels
    )


def _locate_images(examples: Examples, folder: Path) -> Examples:
    """Image paths in a file are relative to that file."""

    def locate(image: Any) -> Any:
        if not isinstance(image, str):
            return image
        if not (folder / image).is_file():
            raise InputError(f"{folder / image}: no such image")
        return folder / image

    return dataclasses.replace(examples, inputs=[map_pictures(one, locate) for one in examples.inputs])


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


def _read_npz(path: Path, labels: Labels | None) -> Examples:
    names = ("images",) if labels is None else ("images", "labels")
    with error_context(path, "not a plain .npz file"), np.load(path, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in names if name in file}
    images, values = arrays.get("images"), arrays.get("labels")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"{path}: needs an array 'images', uint8 [n, height, width, 3]")
    if len(images) and not images[0].size:
        raise InputError(f"{path}: 'images' of shape {list(images.shape)} have no pixels")
    if labels is None or values is None:
        return Examples("image", images)
    dimensions = 2 if labels.kind == "labels" or (labels.kind == "number" and (labels.size or 1) > 1) else 1
    if values.shape[:1] != images.shape[:1] or values.ndim != dimensions:
        raise InputError(f"{path}: {len(images)} images but labels of shape {list(values.shape)}")
    if labels.kind != "number" and values.dtype.kind not in ("iubU" if labels.names else "iub"):
        raise InputError(f"{path}: labels of dtype {values.dtype}, but they must be integers")
    read = [read_label({"labels": value}, "labels", f"{path}, {i}", labels) for i, value in enumerate(values.tolist())]
    return Examples("image", images, labels.array(read))


def _read_image_folder(path: Path, labels: Labels | None) -> Examples:
    """Images by folder; folders are named as the head's classes are, or stand in their order."""
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    folders = [path / name for name in classes] or [path]
    pairs = [(file, k) for k, folder in enumerate(folders) for file in sorted(folder.rglob("*"))]
    pairs = [(file, k) for file, k in pairs if file.suffix.lower() in IMAGE_ENDINGS]
    numbers = list(range(len(classes)))
    if labels is not None and labels.kind == "class" and labels.knows(classes):
        numbers = [read_label({"folder": name}, "folder", f"{path / name}", labels) for name in classes]
    found = np.asarray([numbers[k] for _, k in pairs], dtype=np.int64) if classes and labels is not None else None
    return Examples("image", [file for file, _ in pairs], found)
