"""Reads and changes the tensors of small checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, with a NaN put into it."""
    tensor.view(-1)[5] = float("nan")
    return tensor
