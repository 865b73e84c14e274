"""Build a pool of one base, its tasks' data and their experts: resumable, and each part whole or absent.

Layout under the root: `base/`, `data/<task>/{train,validation,test}.jsonl` (or `.npz`) with `labels.json` and
`source.json`, and `experts/<task>/` as `epmq.demo.finetune.train_expert` writes it.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from epmq.data.examples import Examples
from epmq.data.readers import read_examples
from epmq.demo.finetune import RECORD, SPLITS, TrainingSettings, train_expert
from epmq.errors import InputError, MissingError
from epmq.files import read_json, whole_directory

# Called with the step at hand (`base`, `data/<task>`, `experts/<task>`) and its share done, 0 to 1.
Report = Callable[[str, float], None]


@contextmanager
def step_bars(console: Console) -> Iterator[Report]:
    """A progress bar for each step that is reported."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars: dict[str, TaskID] = {}

        def report(step: str, share: float) -> None:
            if step not in bars:
                bars[step] = progress.add_task(step, total=1.0)
            progress.update(bars[step], completed=share)

        yield report


def build_pool(
    root: Path,
    tasks: Iterable[str],
    prepare_base: Callable[[Path], None],
    prepare_task: Callable[[str, Path], None],
    settings: TrainingSettings,
    report: Report = lambda step, share: None,
) -> dict[str, dict[str, Any]]:
    """Prepare the base, then the data of every task, then train every expert; what is there is kept.

    Args:
        prepare_base: writes the base model's directory into the empty folder that it is given.
        prepare_task: writes splits, `labels.json` and `source.json` of the named task into an empty folder.
        settings: how the experts are trained.

    Returns:
        the content of each expert's `training.json`, by task.
    """

    def prepare(step: str, write: Callable[[Path], Any]) -> None:
        if not (root / step).exists():
            report(step, 0.0)
            with whole_directory(root / step) as work:
                write(work)
        report(step, 1.0)

    def prepare_data(task: str, folder: Path) -> None:
        prepare_task(task, folder)
        _read_task(folder)

    prepare("base", prepare_base)
    for task in tasks:
        prepare(f"data/{task}", partial(prepare_data, task))
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


def split_file(folder: Path, split: str) -> Path:
    """The file of one split in a task's data folder, `.jsonl` or `.npz`.

    Raises:
        FileNotFoundError: there is neither.
    """
    for path in (folder / f"{split}.jsonl", folder / f"{split}.npz"):
        if path.exists():
            return path
    raise MissingError(f"{folder}: no {split}.jsonl and no {split}.npz")
