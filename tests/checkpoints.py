"""Small checkpoints, written without the writer under test."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from epmq.files import write_json
from epmq.models.checkpoint import INDEX, SINGLE

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
