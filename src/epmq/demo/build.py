"""Build a pool of one base, its tasks' data and their experts: resumable, and each part whole or absent.

Layout under the root: `base/`, `data/<task>/{train,validation,test}.jsonl` (or `.npz`) with `labels.json` and
`source.json`, and `experts/<task>/` as `epmq.demo.finetune.train_expert` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epmq.data.examples import Examples
from epmq.data.readers import read_examples
from epmq.demo.finetune import RECORD, TrainingSettings, train_expert
from epmq.demo.pool import split_file
from epmq.errors import InputError
from epmq.files import read_json, whole_directory

SPLITS = ("train", "validation", "test")
# Called with the step at hand (`base`, `data/<task>`, `experts/<task>`) and its share done, 0 to 1.
Report = Callable[[str, float], None]


@contextmanager
def whole_folder(target: Path) -> Iterator[Path | None]:
    """A work folder that becomes `target` by rename when the block ends well; None where `target` exists."""
    if target.exists():
        yield None
        return
    with whole_directory(target) as work:
        yield work


def build_pool(
    root: Path,
    tasks: Sequence[str],
    prepare_base: Callable[[Path], None],
    prepare_task: Callable[[str, Path], None],
    settings: TrainingSettings,
    report: Report = lambda step, share: None,
) -> dict[str, dict[str, Any]]:
    """Prepare the base, then the data of every task, then train every expert; what is there is kept.

    Args:
        root: where the pool lies.
        tasks: names of the tasks.
        prepare_base: writes the base model's directory into the empty folder that it is given.
        prepare_task: writes splits, `labels.json` and `source.json` of the named task into an empty folder.
        settings: how the experts are trained.
        report: see `Report`.

    Returns:
        the content of each expert's `training.json`, by task.
    """
    with whole_folder(root / "base") as work:
        if work is not None:
            report("base", 0.0)
            prepare_base(work)
    report("base", 1.0)
    for task in tasks:
        with whole_folder(root / "data" / task) as work:
            if work is not None:
                report(f"data/{task}", 0.0)
                prepare_task(task, work)
                _read_task(work)
        report(f"data/{task}", 1.0)
    return {task: _build_expert(root, task, settings, report) for task in tasks}


def _build_expert(root: Path, task: str, settings: TrainingSettings, report: Report) -> dict[str, Any]:
    expert, step = root / "experts" / task, f"experts/{task}"
    if (expert / RECORD).exists():
        report(step, 1.0)
        return read_json(expert / RECORD)
    report(step, 0.0)
    splits, labels = _read_task(root / "data" / task)
    return train_expert(root / "base", expert, splits, labels, settings, lambda share: report(step, share))


def _read_task(folder: Path) -> tuple[dict[str, Examples], list[str]]:
    """The splits of a task's data folder and the names of its classes.

    Raises:
        FileNotFoundError, ValueError: a part is missing, or a label has no name.
    """
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    read_json(folder / "source.json")
    splits = {split: read_examples(split_file(folder, split)) for split in SPLITS}
    for split, examples in splits.items():
        if examples.labels is None or not 0 <= examples.labels.min() <= examples.labels.max() < len(labels):
            raise InputError(f"{folder}, {split}: every example needs a label in 0 … {len(labels) - 1}")
    return splits, labels
