"""A run on a tiny model of six blocks, whose output is compared byte for byte; its weights are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from epmq.pipeline.run import run
from epmq.reporting.report import TIMED

BLOCKS = 6
TASKS = ("one", "two")


def write_models(folder: Path) -> None:
    """A base and two experts with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=BLOCKS, num_attention_heads=4, intermediate_size=256
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder / "base")
    for task in TASKS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        model.save_pretrained(folder / task)


def recipe(folder: Path, output: str) -> dict[str, Any]:
    """The default recipe on these models."""
    experts = [{"name": task, "model": str(folder / task)} for task in TASKS]
    return {"base": str(folder / "base"), "experts": experts, "output": str(folder / output)}


def examples() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Calibration batches of every task."""
    generator = torch.Generator().manual_seed(1)
    return {
        task: [{"input_ids": torch.randint(5, 64, (16, 32), generator=generator)} for _ in range(4)] for task in TASKS
    }


def finish(folder: Path, output: str, **fields: Any) -> None:
    """Do the run; `fields` replace or add top-level fields of its recipe."""
    run({**recipe(folder, output), **fields}, progress=False, evaluate=False, calibration=examples())


def contents(folder: Path) -> dict[str, bytes]:
    """File name → bytes, without the two files that tell of times."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: content for name, content in files.items() if name not in TIMED}
