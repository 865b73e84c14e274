"""Small tables, in every form that readers take, and pictures."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

ROWS = [
    {"text": 'he said: "a, b"', "label": 2, "other": "x\ny", "target": "eins"},
    {"text": "ä ü 漢", "label": 0, "other": "", "target": "zwei"},
    {"text": "two\nlines", "label": 1, "other": "z", "target": "drei"},
]


def lines(path: Path, *rows: object) -> Path:
    """A file with one line a row: text as it is, anything else as JSON."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in the form that the file's ending asks for."""
    if path.suffix == ".jsonl":
        return lines(path, *rows)
    if path.suffix == ".csv":
        frame = datasets.Dataset.from_list(rows).to_pandas()
        frame.to_csv(path, index=False)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path
