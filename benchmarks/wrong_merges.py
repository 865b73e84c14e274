"""Merges that should not be: each must end in an error, or in a note of the report, that names the expert."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.suites.build import suite_dir
from epmq.demo.pool import pool_recipe
from epmq.merging.compatibility import SAMPLE, correlation
from epmq.merging.experts import Sources
from epmq.models.blocks import find_stacks, linears
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe

Spoil = Callable[[Path], None]
CLASSES = ["yes", "no", "maybe"]


def other_base(folder: Path) -> None:
    """The expert's weights come from another start."""
    file = folder / "two" / "model.safetensors"
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: tensor[torch.randperm(len(tensor), generator=generator)] for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def too_far(folder: Path) -> None:
    """The expert's weights are a multiple of the base's, as an adapter with a wrong scale makes them."""
    tensors = {name: 4 * tensor for name, tensor in load_file(folder / "base" / "model.safetensors").items()}
    save_file(tensors, folder / "two" / "model.safetensors", metadata={"format": "pt"})


def twice(folder: Path) -> None:
    """One expert under two names."""
    shutil.copyfile(folder / "one" / "model.safetensors", folder / "two" / "model.safetensors")


def untrained(folder: Path) -> None:
    """The base as an expert."""
    shutil.copyfile(folder / "base" / "model.safetensors", folder / "two" / "model.safetensors")


def other_tokens(folder: Path) -> None:
    """The expert's tokenizer numbers tokens in another order."""
    words = [f"word{number}" for number in range(64)]
    for place, order in (("base", words), ("two", words[::-1])):
        (folder / place / "vocab.txt").write_text("\n".join(order))


def too_many_tokens(folder: Path) -> None:
    """The tokenizer has more tokens than the embeddings have rows; this one is the base's, and no expert's, fault."""
    (folder / "base" / "vocab.txt").write_text("\n".join(f"two{number}" for number in range(65)))


def other_labels(folder: Path) -> None:
    """Two heads of one task, with their classes in another order."""
    for place, labels in (("one", CLASSES), ("two", CLASSES[::-1])):
        width = json.loads((folder / "base" / "config.json").read_text())["hidden_size"]
        save_head(Head(torch.ones(3, width), torch.zeros(3), "mean", True, labels), folder / place / HEAD_FILE)


WRONG: list[Spoil] = [other_base, too_far, twice, untrained, other_tokens, too_many_tokens, other_labels]


def caught(spoil: Spoil, models: Path, folder: Path, recipe: Callable[[Path, str], dict[str, Any]]) -> bool:
    """Whether a wrong merge is noticed before any compute, by something that names the expert.

    Args:
        spoil: makes the merge wrong.
        models: holds `base`, `one` and `two`.
        folder: where a copy of them is spoiled.
        recipe: of the models in a folder and an output.
    """
    for name in ("base", "one", "two"):
        shutil.copytree(models / name, folder / name)
    spoil(folder)
    wanted = load_recipe({**recipe(folder, "out"), "quantize": {"method": "rtn"}})
    try:
        said = prepare(wanted, evaluate=False).sources.notes
    except ValueError as error:
        said = [str(error)]
    return any("two" in text or "tokenizer has token number" in text for text in said)


def related(suite: str) -> dict[str, float]:
    """How the line between fine-tunes and strangers lies in a suite's real experts.

    A stranger is an expert whose every block is taken for the next one: real weights of the right shapes and sizes that
    were not fine-tuned from those they are held against.

    Returns:
        experts; the least correlation (the median over layers) of an expert with its base; the greatest of a stranger;
        and the greatest norm of a task vector over that of the base.
    """
    module = importlib.import_module(f"benchmarks.suites.{suite}")
    root, tasks = suite_dir(suite), list(module.TASKS)
    sources = Sources(pool_recipe(root, tasks, max_length=module.MAX_LENGTH, data=getattr(module, "DATA", None)))
    own: dict[str, list[float]] = {task: [] for task in tasks}
    other: dict[str, list[float]] = {task: [] for task in tasks}
    sizes: dict[str, list[float]] = {task: [] for task in tasks}
    rows = slice(0, SAMPLE)
    for stack in find_stacks(sources.model):
        for index, block in enumerate(stack.blocks):
            after = (index + 1) % len(stack.blocks)
            for layer, _ in linears(block):
                name = f"{stack.block_name(index)}.{layer}.weight"
                base = sources.base_rows(name, rows).double()
                for task in tasks:
                    expert = sources.expert_rows(task, name, rows).double()
                    stranger = sources.expert_rows(task, f"{stack.block_name(after)}.{layer}.weight", rows).double()
                    own[task].append(correlation(base, expert))
                    other[task].append(correlation(base, stranger))
                    sizes[task].append(float((expert - base).norm() / base.norm()))
    return {
        "experts": len(tasks),
        "least_of_experts": min(map(median, own.values())),
        "greatest_of_strangers": max(map(median, other.values())),
        "greatest_task_vector": max(map(median, sizes.values())),
    }


def count(models: Path, folder: Path, recipe: Callable[[Path, str], dict[str, Any]]) -> dict[str, int]:
    """How many wrong merges there are, and how many are caught."""
    found = [caught(spoil, models, folder / spoil.__name__, recipe) for spoil in WRONG]
    return {"wrong_merges": len(found), "wrong_merges_caught": sum(found)}
