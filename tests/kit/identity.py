"""Two identities that every architecture is held to: one expert at scaling 1.0 is that expert, and a base that a run
reads is what `from_pretrained` gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import epmq
from epmq.errors import InputError
from epmq.merging.compatibility import open_experts
from epmq.models.blocks import find_stacks
from epmq.recipe import Expert
from tests.kit.architecture_kinds import Architecture
from tests.kit.architectures import ARCHITECTURES
from tests.kit.comparison import different, fine_tuned, gaps
from tests.kit.mixture_layers import with_layers

TOLERANCE = 1e-5
# What may be refused, and the words that must say why: transformers splits tensors of some on load, and others
# have no repeated blocks with linear layers.
REFUSED = {
    "nomic": "converted by transformers on load",
    **dict.fromkeys(("squeezebert", "resnet"), "no list of repeated blocks"),
}
# Tied or not, T5 computes something else; base and expert that differ in that may be refused.
SCALES_TIED = {"t5", "flan_t5", "mt5", "switch"}
# Architecture, whether the base is tied and whether the expert is; None where there is no output layer.
Case = tuple[str, bool | None, bool | None]
CASES: list[Case] = [
    (name, base, expert)
    for name, architecture in ARCHITECTURES.items()
    for base in ((True, False) if architecture.has_output_layer else (None,))
    for expert in ((True, False) if architecture.has_output_layer else (None,))
]


def save_pair(architecture: Architecture, folder: Path, base: bool | None = None, expert: bool | None = None) -> None:
    """Write `base`, and an `expert` that was fine-tuned from it; each tied or not."""
    start = architecture.build(tied=base)
    start.save_pretrained(folder / "base")
    fine_tuned(architecture.build(1, tied=expert), start, 1).save_pretrained(folder / "expert")


def merge_one(folder: Path) -> None:
    """Merge the one expert at scaling 1.0 into `out`."""
    recipe: dict[str, Any] = {"base": str(folder / "base"), "output": str(folder / "out")}
    recipe["experts"] = [{"name": "one", "model": str(folder / "expert")}]
    recipe["merge"] = {"method": "task_arithmetic", "scaling": 1.0}
    epmq.merge(recipe, progress=False)


def unlike_the_expert(architecture: Architecture, folder: Path) -> list[str]:
    """In what `out` is not the expert: tensors that do not load, and outputs that are apart."""
    model_class = getattr(transformers, architecture.model)
    out, info = model_class.from_pretrained(folder / "out", output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    expert, own = model_class.from_pretrained(folder / "expert", output_loading_info=True)
    parts = [f"{kind}: {key}" for kind in kinds for key in set(info[kind]) - set(own[kind])]
    apart = gaps(out.eval(), expert.eval(), architecture.batches())
    return parts + [f"{name} off by {value:.2g}" for name, value in apart.items() if value > TOLERANCE]


def unlike_from_pretrained(architecture: Architecture, folder: Path) -> list[str]:
    """Tensors, buffers and outputs in which the base as a run reads it is not what `from_pretrained` gives."""
    experts = open_experts(str(folder / "base"), [Expert(name="one", model=str(folder / "expert"))])
    found = experts.whole_model(experts.base, torch.device("cpu"))
    wanted = getattr(transformers, architecture.model).from_pretrained(folder / "base").eval()
    layers = with_layers(wanted)
    parts = different(found.state_dict(), layers.state_dict(), 0.0)
    parts += different(dict(found.named_buffers()), dict(layers.named_buffers()), 0.0)
    apart = gaps(found, wanted, architecture.batches())
    return sorted({*parts, *(name for name, value in apart.items() if value > TOLERANCE)})


def drop_what_the_class_makes(architecture: Architecture, folder: Path) -> set[str]:
    """Take out of both files what lies outside the blocks and the class fills in itself, such as sinusoids.

    Returns:
        the names of tensors with more than one number that do not depend on the seed.
    """
    model, other = (architecture.build(seed).state_dict() for seed in (0, 1))
    same = {name for name, tensor in model.items() if tensor.unique().numel() > 1 and tensor.equal(other[name])}
    inside = tuple(f"{stack.name}." for stack in find_stacks(architecture.build()))
    made = {name for name in same if not name.startswith(inside)}
    for path in (folder / "base" / "model.safetensors", folder / "expert" / "model.safetensors"):
        tensors = load_file(path)
        made &= tensors.keys()
        kept = {name: tensor for name, tensor in tensors.items() if name not in made}
        save_file(kept, path, metadata={"format": "pt"})
    return made


def verdict(case: Case, folder: Path) -> tuple[str, str]:
    """What becomes of one case: `right`, `refused` or `wrong`, and why."""
    name, base, expert = case
    architecture = ARCHITECTURES[name]
    save_pair(architecture, folder, base, expert)
    try:
        merge_one(folder)
        wrong = unlike_the_expert(architecture, folder)
        if base == expert:
            wrong += unlike_from_pretrained(architecture, folder)
            if drop_what_the_class_makes(architecture, folder):
                wrong += [f"{part}, not stored" for part in unlike_from_pretrained(architecture, folder)]
    except InputError as error:
        mixed = name in SCALES_TIED and base != expert and "\n" not in str(error)
        return "refused" if mixed or REFUSED.get(name, "nothing else") in str(error) else "wrong", str(error)
    return ("wrong", "; ".join(wrong)) if wrong else ("right", "")


def identities(show: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Count what becomes of every architecture, tied and untied; what is wrong is listed, and goes to `show`."""
    counts, wrong = Counter[str](), list[dict[str, Any]]()
    for case in CASES:
        with TemporaryDirectory() as folder:
            end, why = verdict(case, Path(folder))
        counts[end] += 1
        if end == "wrong":
            wrong.append({"architecture": case[0], "base_tied": case[1], "expert_tied": case[2], "why": why})
            if show is not None:
                show(wrong[-1])
    ends = {end: counts[end] for end in ("right", "refused", "wrong")}
    return {"architectures": len(ARCHITECTURES), "cases": len(CASES), **ends, "failed": wrong}
