"""The data sets of a folder that looks like the Hub: columns and files as there, content at random."""

from __future__ import annotations

import io
import json
import string
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from epmq.reproduce.tables import Task

SIDE = 24  # of a picture, in pixels
Answer = Callable[[list[Any]], list[int]]


def write_split(
    folder: Path, task: Task, split: str, rows: int, random: np.random.Generator, answer: Answer | None
) -> None:
    """One split of a data set: parquet files, or for pictures named after their endings a webdataset."""
    import datasets

    subset = task.data.subset
    if task.data.image == "jpg":
        _write_archive(folder / split / "0.tar", task, rows, random, answer)
        return
    features, content = _columns(task, rows, random, answer)
    _write_rows(folder, subset, split, datasets.Dataset.from_dict(content, features=features))


def _write_rows(folder: Path, subset: str | None, split: str, rows: Any) -> None:
    """One split as parquet; the card of a data set with configurations says which files are whose."""
    from pyarrow import parquet

    parts = folder / (subset or "data")
    file = parts / f"{split}-00000-of-00001.parquet"
    if file.exists():
        return
    parts.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows.with_format("arrow")[:], file)
    if subset:
        configs = [
            {
                "config_name": name,
                "data_files": [
                    {"split": part.name.split("-")[0], "path": f"{name}/{part.name}"}
                    for part in sorted((folder / name).glob("*.parquet"))
                ],
            }
            for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        ]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def write_scored(folder: Path, lm_task: str, rows: int, random: np.random.Generator) -> None:
    """The data of one of lm-eval's tasks: the columns that its definition reads."""
    import datasets

    family, _, language = lm_task.rpartition("_")
    letters = ["A", "B", "C", "D"]

    def row(number: int) -> dict[str, Any]:
        texts = {name: _sentence(random) for name in ("question", "instruction", "ctx_a", "ctx_b", "activity_label")}
        options = {f"option_{letter.lower()}": _sentence(random) for letter in letters}
        picked = {"id": str(number), "answer": str(random.choice(letters))}
        if family == "m_mmlu":
            return {"instruction": texts["instruction"], **options, **picked}
        if family == "arc":
            return {"instruction": texts["instruction"], **options, "option_e": None, **picked}
        if family == "hellaswag":
            context = {name: texts[name] for name in ("ctx_a", "ctx_b", "activity_label")}
            return {**context, "endings": list(options.values()), "label": str(random.integers(0, 4))}
        if family == "gsm8k":
            return {"question": texts["question"], "answer": f"{_sentence(random)}\n#### {random.integers(0, 100)}"}
        ways = ["punctuation:no_comma", "change_case:english_lowercase"]
        return {
            "key": number,
            "prompt": texts["question"],
            "instruction_id_list": ways,
            "kwargs": [{"prompt_to_repeat": ""}] * 2,
        }

    subset = {"gsm8k": "main", "": None}.get(family, language)
    for split in {"gsm8k": ["train", "test"], "hellaswag": ["val"], "": ["train"]}.get(
        family, ["train", "val", "test"]
    ):
        _write_rows(folder, subset, split, datasets.Dataset.from_list([row(number) for number in range(rows)]))


def _columns(
    task: Task, rows: int, random: np.random.Generator, answer: Answer | None
) -> tuple[Any, dict[str, list[Any]]]:
    import datasets

    data = task.data
    if task.classes is not None:
        pictures = [_picture(random) for _ in range(rows)]
        labels = _labels(pictures, len(task.classes), random, answer)
        label_type: Any = datasets.ClassLabel(names=list(task.classes))
        if len(task.classes) == 2 and "pcam" in str(data.dataset).lower().replace("patchcamelyon", "pcam"):
            label_type, labels = datasets.Value("bool"), [bool(label) for label in labels]
        return datasets.Features({data.image: datasets.Image(), data.label: label_type}), {
            data.image: pictures,
            data.label: labels,
        }
    texts = _fields(data.prompt) or ([data.text] if isinstance(data.text, str) else list(data.text))
    columns: dict[str, list[Any]] = {name: [_sentence(random) for _ in range(rows)] for name in texts}
    features: dict[str, Any] = dict.fromkeys(texts, datasets.Value("string"))
    if data.answers is not None:
        features[data.label] = datasets.ClassLabel(names=[f"class {number}" for number in range(len(data.answers))])
        columns[data.label] = random.integers(0, len(data.answers), rows).tolist()
    else:
        for name in _fields(data.answer):
            if name not in columns:
                features[name], columns[name] = datasets.Value("float32"), random.uniform(0, 5, rows).tolist()
    features["idx"], columns["idx"] = datasets.Value("int32"), list(range(rows))
    return datasets.Features(features), columns


def _fields(template: str | None) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template or "") if name]


def _sentence(random: np.random.Generator) -> str:
    words = ["the", "yes", "no", "able", "cat", "sat", "on", "mat", "7", "tree"]
    return " ".join(random.choice(words, int(random.integers(3, 12))).tolist())


def _picture(random: np.random.Generator) -> Image.Image:
    """A picture in colour or in grey; both occur."""
    wide = (SIDE, SIDE + 8, 3) if random.random() < 0.7 else (SIDE, SIDE)
    return Image.fromarray(random.integers(0, 256, wide, dtype=np.uint8))


def _labels(pictures: list[Any], classes: int, random: np.random.Generator, answer: Answer | None) -> list[int]:
    """A class for each picture; three of four are the teacher's where there is one."""
    labels = random.integers(0, classes, len(pictures)).tolist()
    if answer is not None:
        labels = [
            label if row % 4 == 3 else taught for row, (label, taught) in enumerate(zip(labels, answer(pictures)))
        ]
    return labels


def _write_archive(file: Path, task: Task, rows: int, random: np.random.Generator, answer: Answer | None) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = []
    for _ in range(rows):
        stored.append(io.BytesIO())
        _picture(random).convert("L").save(stored[-1], "jpeg")
    labels = _labels([Image.open(picture) for picture in stored], len(task.classes or []), random, answer)
    with tarfile.open(file, "w") as archive:
        for row, (picture, label) in enumerate(zip(stored, labels)):
            for ending, content in (("cls", str(label).encode()), ("jpg", picture.getvalue())):
                entry = tarfile.TarInfo(f"s{row:07d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
