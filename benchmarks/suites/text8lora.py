"""text8lora: base and tasks of text8, each expert a LoRA adapter of rank 8 (a PEFT directory) on every block.

Base and data are text8's, by hard link, and are built there where they are missing; an expert trains on the first
2000 of text8's training texts.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from peft import LoraConfig

from benchmarks.suites import text8
from benchmarks.suites.build import suite_dir, whole_folder

NAME = "text8lora"
TASKS, POOLING, MAX_LENGTH = text8.TASKS, text8.POOLING, text8.MAX_LENGTH
TRAIN = 2000

ADAPTER = LoraConfig(
    task_type="FEATURE_EXTRACTION",
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    bias="none",
    # a pattern and not names: "dense" is also a layer of BERT's pooler, which mean pooling leaves without gradient
    target_modules=r"encoder\.layer\.\d+\..*\.(query|key|value|dense)",
)
SETTINGS: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 32, "adapter": ADAPTER}
QUICK_SETTINGS: dict[str, Any] = SETTINGS | {"epochs": 1}


def prepare_base(folder: Path) -> None:
    """Link text8's base into `folder`, which is empty; text8's is made first where it is missing."""
    source = suite_dir(text8.NAME) / "base"
    with whole_folder(source) as work:
        if work is not None:
            text8.prepare_base(work)
    for path in source.iterdir():
        # hard links cost no space and outlive the removal of text8
        (folder / path.name).hardlink_to(path)


def prepare_task(name: str, folder: Path, quick: bool) -> None:
    """Link one task of text8 into `folder`, which is empty, but for the training texts: the first `TRAIN` of them."""
    source = suite_dir(text8.NAME, quick) / "data" / name
    with whole_folder(source) as work:
        if work is not None:
            text8.prepare_task(name, work, quick)
    for path in source.iterdir():
        if path.name != "train.jsonl":
            (folder / path.name).hardlink_to(path)
    # the splits are in random order, so the first ones are a random draw
    with (source / "train.jsonl").open(encoding="utf-8") as file:
        (folder / "train.jsonl").write_text("".join(islice(file, TRAIN)), encoding="utf-8")
