"""Merges that should not be: each must end in an error, or in a note of the report, that names the expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
    for model, order in (("base", words), ("two", words[::-1])):
        (folder / model / "vocab.txt").write_text("\n".join(order))


def too_many_tokens(folder: Path) -> None:
    """The tokenizer has more tokens than the embeddings have rows; this one is the base's, and no expert's, fault."""
    (folder / "base" / "vocab.txt").write_text("\n".join(f"two{number}" for number in range(65)))


def other_labels(folder: Path) -> None:
    """Two heads of one task, with their classes in another order."""
    for expert, labels in (("one", CLASSES), ("two", CLASSES[::-1])):
        width = json.loads((folder / "base" / "config.json").read_text())["hidden_size"]
        save_head(Head(torch.ones(3, width), torch.zeros(3), "mean", True, labels), folder / expert / HEAD_FILE)


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
    try:
        rounded = load_recipe({**recipe(folder, "out"), "quantize": {"method": "rtn"}})
        notes = prepare(rounded, evaluate=False).experts.notes
    except ValueError as error:
        notes = [str(error)]
    return any("two" in note or "tokenizer has token number" in note for note in notes)


def count(models: Path, folder: Path, recipe: Callable[[Path, str], dict[str, Any]]) -> dict[str, int]:
    """How many wrong merges there are, and how many are caught."""
    noticed = [caught(spoil, models, folder / spoil.__name__, recipe) for spoil in WRONG]
    return {"wrong_merges": len(noticed), "wrong_merges_caught": sum(noticed)}
