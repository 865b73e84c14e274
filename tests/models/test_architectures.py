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
# What may be refused, and the words that must say why: transformers fuses or splits tensors of some on load, and others
# have no repeated blocks with linear layers.
REFUSED = {
    **dict.fromkeys(("qwen3moe", "mixtral", "nomic"), "converted by transformers on load"),
    **dict.fromkeys(("squeezebert", "resnet"), "no list of repeated blocks"),
}
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
        assert REFUSED.get(name, "nothing") in str(error)
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
        assert mixed or REFUSED.get(name, "nothing") in str(error)
        return
    assert is_the_expert(architecture, tmp_path) == {}


def as_from_pretrained(architecture: Architecture, folder: Path) -> list[str]:
    """Tensors, buffers and outputs in which the base as a run reads it is not what `from_pretrained` gives."""
    experts = open_experts(str(folder / "base"), [Expert(name="one", model=str(folder / "expert"))])
    found = experts.whole_model(experts.base, torch.device("cpu"))
    wanted = getattr(transformers, architecture.model).from_pretrained(folder / "base").eval()
    parts = different(found.state_dict(), wanted.state_dict(), 0.0)
    parts += different(dict(found.named_buffers()), dict(wanted.named_buffers()), 0.0)
    apart = gaps(found, wanted, architecture.batches())
    return sorted({*parts, *(name for name, value in apart.items() if value > TOLERANCE)})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_base_loads_as_from_pretrained_loads_it(name, tmp_path):
    architecture = ARCHITECTURES[name]
    save_pair(architecture, tmp_path)
    try:
        assert as_from_pretrained(architecture, tmp_path) == []
    except InputError as error:
        assert REFUSED.get(name, "nothing") in str(error)


def made_by_the_class(architecture: Architecture) -> set[str]:
    """Tensors outside the blocks that a class fills in itself, with more than one number: positions as sinusoids."""
    model, other = (architecture.build(seed).state_dict() for seed in (0, 1))
    same = {name for name, tensor in model.items() if tensor.unique().numel() > 1 and tensor.equal(other[name])}
    inside = tuple(f"{stack.name}." for stack in find_stacks(architecture.build()))
    return {name for name in same if not name.startswith(inside)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_class_makes_itself_need_not_be_stored(name, tmp_path):
    architecture = ARCHITECTURES[name]
    if name in REFUSED:
        pytest.skip("no base")
    made = made_by_the_class(architecture)
    save_pair(architecture, tmp_path)
    for folder in (tmp_path / "base", tmp_path / "expert"):
        tensors = load_file(folder / "model.safetensors")
        made &= tensors.keys()
        kept = {stored: tensor for stored, tensor in tensors.items() if stored not in made}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if not made:
        pytest.skip("nothing that is stored is made by the class")
    assert as_from_pretrained(architecture, tmp_path) == []
    merge_one(tmp_path)
    assert is_the_expert(architecture, tmp_path) == {}
