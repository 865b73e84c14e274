"""Build a pool of one base, its tasks' data and their experts: resumable, and each part whole or absent.

Layout under the root: `base/`, `data/<task>/{train,validation,test}.jsonl` (or `.npz`) with `labels.json` and
`source.json`, and `experts/<task>/` as `epmq.demo.finetune.train_expert` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epmq.data.examples import Examples
from epmq.data.readers import read_examples
from epmq.demo.pool import split_file
from epmq.errors import InputError
from epmq.files import whole_directory

SPLITS = ("train", "validation", "test")
Report = Callable[[str, float], None]


@contextmanager
def whole_folder(target: Path) -> Iterator[Path | None]:
    """A work folder that becomes `target` by rename when the block ends well; None where `target` exists."""
    if target.exists():
        yield None
        return
    with whole_directory(target) as work:
        yield work


def read_split(folder: Path, split: str) -> Examples:
    """One split of a task's data folder, be it `.jsonl` or `.npz`."""
    return read_examples(split_file(folder, split))


def build_pool(
    root: Path,
    tasks: Sequence[str],
    prepare_base: Callable[[Path], None],
    prepare_task: Callable[[str, Path], None],
    *,
    pooling: str,
    max_length: int | None,
    settings: Mapping[str, Any],
    report: Report = lambda step, share: None,
) -> dict[str, dict[str, Any]]:
    """Prepare the base, then the data of every task, then train every expert; what is there is kept.

    Args:
        root: where the pool lies.
        tasks: names of the tasks.
        prepare_base: writes the base model's directory into the empty folder that it is given.
        prepare_task: writes splits, `labels.json` and `source.json` of the named task into an empty folder.
        pooling, max_length: of the heads and of the texts (see `train_expert`).
        settings: further arguments of `train_expert`.
        report: called with the step at hand (`base`, `data/<task>`, `experts/<task>`) and its share done.

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
                _check(work)
        report(f"data/{task}", 1.0)
    return {task: _expert(root, task, pooling, max_length, settings, report) for task in tasks}


def _expert(
    root: Path, task: str, pooling: str, max_length: int | None, settings: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    done = root / "experts" / task / "training.json"
    step = f"experts/{task}"
    if done.exists():
        report(step, 1.0)
        record: dict[str, Any] = json.loads(done.read_text())
        return record
    # imported late: a pool that is complete must open without loading transformers
    from epmq.demo.finetune import train_expert

    report(step, 0.0)
    data = root / "data" / task
    train, validation, test = (read_split(data, split) for split in SPLITS)
    return train_expert(
        root / "base",
        root / "experts" / task,
        train,
        validation,
        test,
        json.loads((data / "labels.json").read_text()),
        pooling=pooling,
        max_length=max_length,
        progress=lambda share: report(step, share),
        **settings,
    )


def _check(folder: Path) -> None:
    """Raise where a task's data folder lacks a part or has labels without a name."""
    labels = json.loads((folder / "labels.json").read_text())
    json.loads((folder / "source.json").read_text())
    for split in SPLITS:
        examples = read_split(folder, split)
        if examples.labels is None or not 0 <= examples.labels.min() <= examples.labels.max() < len(labels):
            raise InputError(f"{folder}, {split}: every example needs a label in 0 … {len(labels) - 1}")
