"""Mixtures of experts: linear layers in the place of fused tensors compute the same, and are found on disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moe_families import EXPERTS, MIXTURES

from epmq.models.meta import matrices_on_disk, rename
from epmq.models.mixtures import Mixture, is_fused, mixtures, routers, unfuse
from epmq.models.pieces import piece_of
from tests.kit.mixture_layers import with_layers


def fused_modules(model: Any) -> list[torch.nn.Module]:
    return [module for module in model.modules() if is_fused(module)]


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_linear_layers_compute_what_the_fused_experts_do(family):
    model = MIXTURES[family]()
    made = mixtures(with_layers(model))
    fused = {name: model.get_submodule(name) for name in made}
    assert fused and all(is_fused(module) for module in fused.values())
    chosen = torch.tensor([0, 1, 3])[torch.rand(7, 3).topk(2).indices]  # one expert is without tokens
    states, weights = torch.randn(7, 32), torch.rand(7, 2)
    for name, module in fused.items():
        found, wanted = (one(states, chosen, weights) for one in (made[name], module))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_matrices_are_named_as_transformers_saves_them(family, tmp_path):
    model = MIXTURES[family]()
    model.save_pretrained(tmp_path)
    made = unfuse(copy.deepcopy(model).to("meta"))
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored, extra = rename(made, file.keys())
    assert not extra and set(stored) == set(made.state_dict()) and not fused_modules(made)
    matrices = {name: disk for name, disk in stored.items() if ".experts." in name and piece_of(disk) is None}
    assert matrices_on_disk(made) == matrices and bool(matrices) == (family not in ("gpt_oss", "granite"))


def test_routers_and_gates_of_shared_experts_are_found():
    found = {family: sorted(routers(unfuse(MIXTURES[family]().to("meta")))) for family in ("qwen2_moe", "deepseek_v3")}
    assert found["qwen2_moe"][:2] == ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]
    assert found["deepseek_v3"] == ["model.layers.1.mlp.gate"]


def test_without_values_every_expert_sees_every_token():
    made = next(iter(mixtures(unfuse(MIXTURES["mixtral"]().to("meta"))).values()))
    assert isinstance(made, Mixture)
    called = []
    for index, expert in enumerate(made.experts):
        expert.down_proj.register_forward_hook(lambda module, args, output, index=index: called.append(index))
    states = torch.empty(5, 32, device="meta")
    chosen = torch.empty(5, 2, dtype=torch.long, device="meta")
    assert made(states, chosen, torch.empty(5, 2, device="meta")).shape == (5, 32)
    assert called == list(range(EXPERTS))
