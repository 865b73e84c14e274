"""What transformers converts into fused parameters of experts is found piece by piece."""

from __future__ import annotations

from typing import Any

import moe_families
import pytest
import torch
from moe_families import EXPERTS
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from epmq.errors import InputError
from epmq.models.mixtures import mixtures, unfuse
from epmq.models.origins import Origins
from epmq.models.pieces import piece_of

PATH, TARGET = "mlp.experts", "mlp.experts.gate_up_proj"
EACH = [MergeModulelist(0), Concatenate(1)]
# What lies on disk, how it is converted, and into what: gate and up are 32 by 48 each.
CASES: list[tuple[dict[str, tuple[int, ...]], list[str], list[Any]]] = [
    (
        {f"{PATH}.{i}.w{n}.weight": (32, 48) for i in range(EXPERTS) for n in (1, 3)},
        ["*.w1.weight", "*.w3.weight"],
        EACH,
    ),
    ({f"{PATH}.{i}.w13.weight": (64, 48) for i in range(EXPERTS)}, ["*.w13.weight"], [MergeModulelist(0)]),
    ({f"{PATH}.{n}": (EXPERTS, 32, 48) for n in ("gate", "up")}, ["gate", "up"], [Concatenate(1)]),
    ({f"{PATH}.w13": (EXPERTS, 64, 48)}, ["w13"], [Interleave(1)]),
    ({f"{PATH}.w13": (EXPERTS, 48, 64)}, ["w13"], [Transpose(1, 2)]),
    ({f"{PATH}.w13": (EXPERTS, 48, 64)}, ["w13"], [Transpose(1, 2, check_dims=True)]),
    ({f"{PATH}.w13": (EXPERTS, 64, 48)}, ["w13"], [Transpose(1, 2, check_dims=True)]),
]


def mixture() -> Any:
    model = moe_families.mixture("Qwen3Moe", num_experts=EXPERTS, hidden_size=48, moe_intermediate_size=32)()
    return next(iter(mixtures(unfuse(model.to("meta"))).values()))


class Model:
    """As far as a conversion asks it."""

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(EXPERTS, 64, 48)


@pytest.mark.parametrize(("stored", "ends", "operations"), CASES)
def test_pieces_are_what_transformers_converts(stored, ends, operations):
    tensors = {name: torch.randn(shape) for name, shape in stored.items()}
    patterns = [f"{PATH}.{end}" for end in ends]
    converter = WeightConverter(patterns, TARGET, operations)
    whole = {
        pattern: [tensors[name] for name in stored if name.endswith(end.removeprefix("*"))]
        for pattern, end in zip(patterns, ends)
    }
    for operation in operations:
        whole = operation.convert(
            whole, source_patterns=patterns, target_patterns=[TARGET], model=Model(), full_layer_name=TARGET
        )
    fused, found = whole[TARGET], dict[str, torch.Tensor]()
    origins = Origins({PATH: mixture()}, [], [converter])
    for name, tensor in tensors.items():
        pattern = next(pattern for pattern, end in zip(patterns, ends) if name.endswith(end.removeprefix("*")))
        for layer, place in origins.of(name, TARGET, pattern).items():
            piece = piece_of(place)
            entry = tensor if piece is None or piece.index is None else tensor[piece.index]
            found[layer] = entry if piece is None else piece.take(entry)
            assert piece is None or piece.shape(tuple(tensor.shape)) == found[layer].shape
    for index in range(EXPERTS):
        pair = [found[f"{PATH}.{index}.{half}_proj.weight"] for half in ("gate", "up")]
        assert torch.equal(torch.cat(pair), fused[index])


def test_other_conversions_are_refused():
    converter = WeightConverter(f"{PATH}.w13", [TARGET, "mlp.experts.other"], [Chunk(1)])
    with pytest.raises(InputError, match=r"'mlp\.experts\.w13' is converted by transformers on load"):
        Origins({PATH: mixture()}, [], [converter]).of(f"{PATH}.w13", TARGET, f"{PATH}.w13")
