"""Build a suite (base, data, experts) in `$EPMQ_CACHE/suites`, with progress and a table of accuracies.

A suite is a module with `NAME`, `TASKS` (name → callable), `POOLING`, `MAX_LENGTH`, `SETTINGS` and
`QUICK_SETTINGS` (fields of `TrainingSettings`), `prepare_base(folder)` and `prepare_task(name, folder,
quick)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from epmq.demo.build import build_pool, step_bars
from epmq.demo.finetune import TrainingSettings
from epmq.files import cache_dir, whole_directory

QUICK_SIZES = {"train": 300, "validation": 100, "test": 200}


def suite_dir(name: str, quick: bool = False) -> Path:
    """Where the suite `name` lies; the quick form has a folder of its own."""
    return cache_dir() / "suites" / (f"{name}-quick" if quick else name)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path | None]:
    """A work folder that becomes `target` by rename when the block ends well; None where `target` exists."""
    if target.exists():
        yield None
        return
    with whole_directory(target) as work:
        yield work


def chosen_tasks(suite: ModuleType, tasks: Sequence[str] | None) -> list[str]:
    """The named tasks of a suite; all of them for None.

    Raises:
        ValueError: a task that the suite does not have.
    """
    unknown = [task for task in tasks or [] if task not in suite.TASKS]
    if unknown:
        raise ValueError(f"suite {suite.NAME}: no task {', '.join(unknown)}; it has {', '.join(suite.TASKS)}")
    return list(suite.TASKS if tasks is None else tasks)


def build_suite(suite: ModuleType, tasks: Sequence[str] | None = None, quick: bool = False) -> Path:
    """Build a suite, or the named tasks of it; parts that are already there are kept.

    Args:
        suite: a suite module (see the top of this file).
        tasks: names out of `suite.TASKS`; None takes all of them.
        quick: small splits and `QUICK_SETTINGS`, in a folder of their own.

    Returns:
        the folder of the suite.

    Raises:
        ValueError: a task that the suite does not have.
    """
    tasks = chosen_tasks(suite, tasks)
    root, console = suite_dir(suite.NAME, quick), Console()
    with step_bars(console) as show:

        def report(step: str, share: float) -> None:
            show(step, share)
            if share == 1.0 and not console.is_terminal:
                # a log file sees no bars, so it gets one line a finished step
                console.print(f"{step}: done")

        records = build_pool(
            root,
            tasks,
            suite.prepare_base,
            lambda task, folder: suite.prepare_task(task, folder, quick),
            TrainingSettings(suite.POOLING, suite.MAX_LENGTH, **(suite.QUICK_SETTINGS if quick else suite.SETTINGS)),
            report,
        )
    console.print(accuracy_table(root.name, records))
    console.print(f"in {root}")
    return root


def accuracy_table(title: str, records: dict[str, dict[str, Any]]) -> Table:
    """Accuracies of base and expert, in percent, from each task's `training.json`."""
    table = Table("task", "train", "test", title=title)
    keys = {
        "base_validation": "base val.",
        "validation": "expert val.",
        "base_test": "base test",
        "test": "expert test",
    }
    for heading in (*keys.values(), "seconds"):
        table.add_column(heading, justify="right")
    for task, record in records.items():
        sizes = [str(record["examples"][split]) for split in ("train", "test")]
        table.add_row(task, *sizes, *(f"{100 * record[key]:.1f}" for key in keys), f"{record['seconds']:.0f}")
    means = (sum(record[key] for record in records.values()) / len(records) for key in keys)
    table.add_row("mean", "", "", *(f"{100 * mean:.1f}" for mean in means), "", style="bold")
    return table
