"""What the suites of language models share: rows on disk, batches, metrics, the training loop and the build.

A suite is a module with `NAME`, `KIND` (`causal` or `seq2seq`), `TASKS` (name → callable that takes sizes and
gives a `Prepared`), `MAX_LENGTH`, `SIZES`, `SETTINGS` and `QUICK_SETTINGS` (arguments of `train_expert`), and
`prepare_base(folder, root, quick)`, which may read the training splits that lie in `root/data`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.suites.build import chosen_tasks, suite_dir, whole_folder
from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.demo.finetune import SPLITS, training_order
from epmq.demo.texts import TextTask, split
from epmq.files import write_json
from epmq.models.multitask import MultiTaskModel
from epmq.pipeline.metrics import metric_of, scorer_of

IGNORED = -100
QUICK_SIZES = {"train": 64, "validation": 16, "test": 24}

Row = dict[str, str]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prepared:
    """All rows of a task, before they are split.

    Attributes:
        rows: `{"text": …}` or `{"text": …, "target": …}`.
        source: package, version and licence of the data.
        groups: for each row what it was cut from (a file, a page); the rows of a group stay in one split. None
            where rows stand on their own.
    """

    rows: list[Row]
    source: dict[str, str]
    groups: list[str] | None = None


def write_splits(folder: Path, prepared: Prepared, sizes: dict[str, int]) -> None:
    """Drop repeated texts, split, and write `{train,validation,test}.jsonl` and `source.json` into `folder`."""
    first = {" ".join(row["text"].split()): i for i, row in reversed(list(enumerate(prepared.rows)))}
    kept = sorted(first.values())
    rows = [prepared.rows[i] for i in kept]
    groups = None if prepared.groups is None else [prepared.groups[i] for i in kept]
    texts = [row["text"] for row in rows]
    for name, index in split(TextTask(texts, [0] * len(rows), [], {}, groups), sizes).items():
        lines = (json.dumps(rows[i], ensure_ascii=False) + "\n" for i in index)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rule = "at random" if groups is None else "at random by group: no group lies in two splits"
    write_json(folder / "source.json", prepared.source | {"split": f"{rule}; seed 0; repeated texts dropped"})


def read_rows(folder: Path, name: str) -> list[Row]:
    """One split of a task's data folder."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def examples_of(rows: Sequence[Row], kind: str) -> Examples:
    """Rows as what epmq evaluates."""
    targets = [row["target"] for row in rows] if kind == "seq2seq" else None
    return Examples(kind, [row["text"] for row in rows], targets=targets)


def make_batch(tokenizer: Any, rows: Sequence[Row], kind: str, max_length: int) -> Batch:
    """Token ids, masks and labels of some rows; texts are cut to `max_length` tokens, padding has no label."""
    batch = next(encode(examples_of(rows, kind), tokenizer, len(rows), max_length))
    # by mask and not by id: the padding token may be the end token, which is a token to learn
    return {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED), **batch}


def shuffled_batches(
    tokenizer: Any, rows: Sequence[Row], kind: str, max_length: int, batch_size: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """One epoch of batches in random order, each of texts of like length."""
    order = training_order(Examples("text", [row["text"] for row in rows], None), batch_size, rng)
    for start in range(0, len(order), batch_size):
        yield make_batch(tokenizer, [rows[i] for i in order[start : start + batch_size]], kind, max_length)


def measure(model: Any, tokenizer: Any, rows: Sequence[Row], kind: str, max_length: int) -> float:
    """The metric of the kind: log-perplexity (lower is better) or exact match (higher is better)."""
    whole = MultiTaskModel(model.eval(), {}, tokenizer)
    examples = examples_of(rows, kind)
    return scorer_of(examples)(whole, "", examples, max_length=max_length)


def train(
    model: Any,
    epoch: Callable[[np.random.Generator], Iterable[Batch]],
    *,
    epochs: int,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    after_epoch: Callable[[], None] = lambda: None,
    progress: Callable[[float, float], None] = lambda share, loss: None,
) -> None:
    """Train all weights with AdamW: linear warm-up over a tenth, linear decay to zero, gradients clipped to 1.

    Args:
        model: anything with `model(**batch).loss`.
        epoch: gives the batches of one epoch, drawn with the generator it is given.
        epochs: how many.
        steps: batches an epoch.
        learning_rate: at its highest.
        seed: of the order and of dropout.
        after_epoch: called at the end of each epoch.
        progress: called with the share done and the loss of each step.
    """
    torch.manual_seed(seed)
    rng, step, total = np.random.default_rng(seed), 0, epochs * steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    warm_up = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (total - step) / max(1, total - warm_up))
    )
    for _ in range(epochs):
        model.train()
        for batch in epoch(rng):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            progress(step / total, loss.item())
        after_epoch()


def load(folder: Path, kind: str) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a directory."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    classes = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
    return classes[kind].from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def train_expert(
    base: Path,
    out: Path,
    splits: Mapping[str, Sequence[Row]],
    kind: str,
    max_length: int,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
    progress: Callable[[float, float], None] = lambda share, loss: None,
) -> dict[str, Any]:
    """Fine-tune `base` on one task; write the epoch that is best in validation, and `training.json`, into `out`.

    Args:
        base: directory of the base.
        out: an empty folder.
        splits: rows of `train`, `validation` and `test`.
        kind, max_length: of the suite.
        epochs, learning_rate, batch_size, seed: of the training (see `train`).
        progress: called with the share done and the loss of each step.

    Returns:
        the content of `training.json`: metric of base and expert on validation and test among it.
    """
    start = time.time()
    model, tokenizer = load(base, kind)
    sign = -1 if kind == "causal" else 1
    record: dict[str, Any] = {"metric": metric_of(examples_of(splits["test"], kind))}
    for name in ("validation", "test"):
        record[f"base_{name}"] = measure(model, tokenizer, splits[name], kind, max_length)
    history: list[float] = []

    def after_epoch() -> None:
        history.append(measure(model, tokenizer, splits["validation"], kind, max_length))
        if sign * history[-1] >= max(sign * value for value in history):
            model.save_pretrained(out)

    train(
        model,
        lambda rng: shuffled_batches(tokenizer, splits["train"], kind, max_length, batch_size, rng),
        epochs=epochs,
        steps=-(-len(splits["train"]) // batch_size),
        learning_rate=learning_rate,
        seed=seed,
        after_epoch=after_epoch,
        progress=progress,
    )
    tokenizer.save_pretrained(out)
    # what is on disk is what is measured
    model, tokenizer = load(out, kind)
    record |= {
        "validation": max(history, key=lambda value: sign * value),
        "test": measure(model, tokenizer, splits["test"], kind, max_length),
        "validation_by_epoch": history,
        "examples": {name: len(splits[name]) for name in SPLITS},
        "settings": {
            "max_length": max_length,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "seed": seed,
        },
        "seconds": round(time.time() - start, 1),
    }
    write_json(out / "training.json", record)
    return record


class Log:
    """Prints a line at the start of a step and at each tenth of it, for a terminal and a log file alike."""

    def __init__(self, step: str) -> None:
        self.step, self.start, self.tenth = step, time.time(), 0
        self.losses: list[float] = []
        print(f"{step}: …", flush=True)

    def __call__(self, share: float, loss: float) -> None:
        """Note a training step."""
        self.losses.append(loss)
        if int(10 * share) > self.tenth:
            self.tenth = int(10 * share)
            mean, seconds = float(np.mean(self.losses)), time.time() - self.start
            print(f"{self.step}: {10 * self.tenth} %, loss {mean:.3f}, {seconds:.0f} s", flush=True)
            self.losses.clear()


def build(suite: ModuleType, tasks: Sequence[str] | None = None, quick: bool = False) -> Path:
    """Build a suite of language models, or the named experts of it; parts that are already there are kept.

    The data of all tasks is prepared in any case: a base may be made of it.

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
    root = suite_dir(suite.NAME, quick)
    for task in suite.TASKS:
        with whole_folder(root / "data" / task) as work:
            if work is not None:
                print(f"data/{task}: …", flush=True)
                write_splits(work, suite.TASKS[task](), QUICK_SIZES if quick else suite.SIZES[task])
    with whole_folder(root / "base") as work:
        if work is not None:
            suite.prepare_base(work, root, quick)
    records = {task: _expert(suite, root, task, quick) for task in tasks}
    Console().print(metric_table(root.name, records))
    print(f"in {root}")
    return root


def _expert(suite: ModuleType, root: Path, task: str, quick: bool) -> dict[str, Any]:
    target = root / "experts" / task
    with whole_folder(target) as work:
        if work is not None:
            splits = {name: read_rows(root / "data" / task, name) for name in SPLITS}
            settings = suite.QUICK_SETTINGS if quick else suite.SETTINGS
            log = Log(f"experts/{task}")
            train_expert(root / "base", work, splits, suite.KIND, suite.MAX_LENGTH, **settings, progress=log)
    record: dict[str, Any] = json.loads((target / "training.json").read_text())
    return record


def metric_table(title: str, records: dict[str, dict[str, Any]]) -> Table:
    """Metric of base and expert from each task's `training.json`."""
    metric = next(iter(records.values()))["metric"].replace("_", " ") if records else ""
    table = Table("task", "train", "test", title=f"{title}: {metric}")
    keys = {
        "base_validation": "base val.",
        "validation": "expert val.",
        "base_test": "base test",
        "test": "expert test",
    }
    for heading in (*keys.values(), "seconds"):
        table.add_column(heading, justify="right")
    for task, record in records.items():
        sizes = [str(record["examples"][name]) for name in ("train", "test")]
        table.add_row(task, *sizes, *(f"{record[key]:.3f}" for key in keys), f"{record['seconds']:.0f}")
    return table
