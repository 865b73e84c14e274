"""LoRA adapters that PEFT writes, and experts made of them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from epmq.merging.compatibility import open_experts
from epmq.merging.experts import ExpertSet
from epmq.models.adapter import CONFIG
from epmq.recipe import Expert

WEIGHTS = "adapter_model.safetensors"


def adapt(model: Any, folder: Path, moved: bool = True, size: float = 0.1, **fields: Any) -> Any:
    """A PEFT model whose adapter is written to `folder`, with every trained weight moved off its start by `size`."""
    model = get_peft_model(model, LoraConfig(**{"r": 4, **fields}))
    if moved:
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def open_adapters(base: Path, *experts: Path) -> ExpertSet:
    """A base and its experts, which are called `t0`, `t1` and so on."""
    return open_experts(str(base), [Expert(name=f"t{i}", model=str(path)) for i, path in enumerate(experts)])


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
