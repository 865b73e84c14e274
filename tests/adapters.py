"""LoRA adapters that PEFT writes, and recipes of them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from epmq.merging.experts import Sources
from epmq.models.adapter import CONFIG
from epmq.recipe import load_recipe

WEIGHTS = "adapter_model.safetensors"


def adapt(model: Any, folder: Path, moved: bool = True, **fields: Any) -> Any:
    """A PEFT model whose adapter is written to `folder`, with every trained weight moved off its start."""
    model = get_peft_model(model, LoraConfig(**{"r": 4, **fields}))
    if moved:
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def sources_of(base: Path, *experts: Path) -> Sources:
    names = [{"name": f"t{i}", "model": str(path)} for i, path in enumerate(experts)]
    return Sources(load_recipe({"base": str(base), "experts": names}))


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
