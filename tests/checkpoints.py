"""Reads and changes the tensors of small checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from epmq.files import write_json
from epmq.models.checkpoint import INDEX, SINGLE


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of one file."""
    return load_file(Path(folder) / "model.safetensors")


def is_quantized(name: str) -> bool:
    """Whether a run quantizes this tensor of a BERT."""
    ends = ("query.weight", "key.weight", "value.weight", "dense.weight")
    return name.startswith("encoder.layer.") and name.endswith(ends)


def edit_weights(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Replace tensors by a function of them, or drop them; `__` stands for a dot."""
    tensors = weights(folder)
    for key, change in changes.items():
        name = key.replace("__", ".")
        old = tensors.pop(name, torch.zeros(1))
        if change is not None:
            tensors[name] = change(old)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


GONE = object()


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of a config.json, or drop them (`GONE`); `__` stands for a dot, into a dict."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in fields.items():
        *parents, name = key.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        if value is GONE:
            part.pop(name, None)
        else:
            part[name] = value
    path.write_text(json.dumps(content))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, with a NaN put into it."""
    tensor.view(-1)[5] = float("nan")
    return tensor


CONFIG = {"model_type": "bert"}


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(2, 2).half(),
        "d": torch.arange(6).int(),
        "e": torch.randn(2, 3, 4).double(),
    }


def saved(folder: Path, tensors: dict[str, torch.Tensor], several: bool = False) -> Path:
    """A checkpoint directory with one file, or with `several`, one a tensor."""
    folder.mkdir(exist_ok=True)
    files = {name: f"model-{i + 1:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors)}
    if several:
        for name, file in files.items():
            save_file({name: tensors[name]}, folder / file)
        write_json(folder / INDEX, {"weight_map": files})
    else:
        save_file(tensors, folder / SINGLE)
    write_json(folder / "config.json", CONFIG)
    return folder
