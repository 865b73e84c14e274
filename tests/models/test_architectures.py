"""Architectures by number: one expert at scaling 1.0 is that expert, and a base loads as `from_pretrained` loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import epmq
from epmq.errors import InputError
from epmq.merging.compatibility import open_experts
from epmq.models.blocks import find_stacks
from epmq.recipe import Expert
from tests.kit.architectures import ARCHITECTURES, Architecture
from tests.kit.comparison import different, fine_tuned, gaps

TOLERANCE = 1e-5
# transformers fuses or splits tensors of these on load, which is refused by name.
CONVERTED = {"qwen3moe", "mixtral", "granitemoe", "gptoss", "dinov2", "llava", "gemma3_vision", "qwen2vl", "siglip"}
# Tied or not, T5 computes something else; base and expert that differ in that may be refused.
SCALES_TIED = {"t5", "flan_t5", "mt5", "switch"}
MIXTURES = [
    (name, base, expert)
    for name, architecture in ARCHITECTURES.items()
    if architecture.has_output_layer
    for base in (True, False)
    for expert in (True, False)
]


def save_pair(
    architecture: Architecture, folder: Path, base_tied: bool | None = None, expert_tied: bool | None = None
) -> None:
    """Write `base`, and an `expert` that was fine-tuned from it."""
    base = architecture.build(tied=base_tied)
    base.save_pretrained(folder / "base")
    fine_tuned(architecture.build(1, tied=expert_tied), base, 1).save_pretrained(folder / "expert")


def merge_one(folder: Path) -> None:
    """Merge the one expert at scaling 1.0 into `out`."""
    recipe: dict[str, Any] = {"base": str(folder / "base"), "output": str(folder / "out")}
    recipe["experts"] = [{"name": "one", "model": str(folder / "expert")}]
    recipe["merge"] = {"method": "task_arithmetic", "scaling": 1.0}
    epmq.merge(recipe, progress=False)


def is_the_expert(architecture: Architecture, folder: Path) -> dict[str, float]:
    """The outputs by which what was merged is apart from the expert, beyond the tolerance."""
    model_class = getattr(transformers, architecture.model)
    out, info = model_class.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expert = model_class.from_pretrained(folder / "expert")
    apart = gaps(out.eval(), expert.eval(), architecture.batches())
    return {name: value for name, value in apart.items() if value > TOLERANCE}


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if not one.has_output_layer])
def test_one_expert_at_full_scale_is_that_expert(name, tmp_path):
    architecture = ARCHITECTURES[name]
    save_pair(architecture, tmp_path)
    try:
        merge_one(tmp_path)
    except InputError as error:
        assert name in CONVERTED and "on load" in str(error)
        return
    assert is_the_expert(architecture, tmp_path) == {}


@pytest.mark.parametrize(("name", "base_tied", "expert_tied"), MIXTURES)
def test_one_expert_is_that_expert_tied_or_not(name, base_tied, expert_tied, tmp_path):
    architecture = ARCHITECTURES[name]
    save_pair(architecture, tmp_path, base_tied, expert_tied)
    try:
        merge_one(tmp_path)
    except InputError as error:
        mixed = name in SCALES_TIED and base_tied != expert_tied and "\n" not in str(error)
        assert mixed or (name in CONVERTED and "on load" in str(error)), error
        return
    assert is_the_expert(architecture, tmp_path) == {}
