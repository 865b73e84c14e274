"""Layers of experts are calibrated on the tokens that the merged model's router sends them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import padded_batches, perturbed
from families import text_model
from moe_families import MIXTURES
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from epmq.calibration.engine import LayerReport
from epmq.models.mixtures import Mixture
from epmq.pipeline.prepare import PreparedRun, prepare
from epmq.pipeline.run import calibration_batches, calibration_engine
from epmq.recipe_file import load_recipe

CALIBRATION = {"one": padded_batches(2), "two": padded_batches(1)}
SAME = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": None},
    **{"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def prepared_models(folder: Path, models: dict[str, Any], **quantize: Any) -> PreparedRun:
    for name, model in models.items():
        model.save_pretrained(folder / name)
    experts = [{"name": name, "model": str(folder / name)} for name in ("one", "two")]
    recipe = {"base": str(folder / "base"), "experts": experts, "quantize": quantize}
    return prepare(load_recipe(recipe), evaluate=False, calibration=CALIBRATION)


def in_memory(prepared: PreparedRun) -> tuple[list[LayerReport], dict[str, Any]]:
    """Reports of all layers, and the quantized weights by the layers' names."""
    blocks = list(calibration_engine(prepared, calibration_batches(prepared)))
    reports = [report for block in blocks for report in block.reports]
    return reports, {name: weight for block in blocks for name, weight in block.layers.items()}


def as_mixture(dense: Any) -> Any:
    """A decoder whose router sends all tokens to one of two experts, both of which are the dense one's layers."""
    mixture = text_model(MixtralConfig, MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1, **SAME)
    state = dense.state_dict()
    for name, tensor in mixture.state_dict().items():
        part = name.replace(".experts", "")
        if name.endswith("gate_up_proj"):
            halves = [state[part.replace("gate_up_proj", half)] for half in ("gate_proj.weight", "up_proj.weight")]
            tensor.copy_(torch.cat(halves).expand_as(tensor))
        elif ".experts." in name:
            tensor.copy_(state[f"{part}.weight"].expand_as(tensor))
        elif ".gate." in name:
            tensor.zero_()
        else:
            tensor.copy_(state[name])
    return mixture


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "expert_guided"])
def test_all_tokens_at_one_expert_give_what_a_dense_layer_gets(method, tmp_path):
    base = text_model(MistralConfig, MistralForCausalLM, **SAME)
    dense = {"base": base, **{name: perturbed(copy.deepcopy(base), seed) for seed, name in enumerate(("one", "two"))}}
    mixture = {name: as_mixture(model) for name, model in dense.items()}
    settings: dict[str, Any] = {"method": method, "bits": 4}
    settings |= {"expert_features": 0.5, "expert_stream": False} if method == "expert_guided" else {}
    wanted_reports, wanted = in_memory(prepared_models(tmp_path / "dense", dense, **settings))
    reports, found = in_memory(prepared_models(tmp_path / "mixture", mixture, **settings))
    tokens = {report.name: report.tokens for report in reports if ".experts." in report.name}
    used = {name.split(".experts.")[1].split(".")[0] for name, count in tokens.items() if count}
    assert len(used) == 1
    for report in wanted_reports:
        name = report.name.replace(".mlp.", f".mlp.experts.{used.copy().pop()}.")
        one, other = wanted[report.name], found[name]
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale), name
        assert ".mlp." not in name or tokens[name] == report.tokens


@torch.no_grad()
def test_experts_go_by_the_merged_models_router(tmp_path, monkeypatch):
    base = MIXTURES["qwen3_moe"]()
    models = {"base": base, **{name: perturbed(copy.deepcopy(base), seed) for seed, name in enumerate(("one", "two"))}}
    for block in models["two"].model.layers:
        block.mlp.gate.weight.neg_()  # alone it would choose the others
    seen, forward = list[tuple[Mixture, torch.Tensor]](), Mixture.forward

    def watched(mixture: Mixture, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((mixture, chosen))
        return forward(mixture, states, chosen, weights)

    prepared = prepared_models(tmp_path, models, method="expert_guided", expert_features=0.5)
    monkeypatch.setattr(Mixture, "forward", watched)
    in_memory(prepared)
    live = {id(prepared.experts.model.get_submodule(f"model.layers.{block}.mlp.experts")) for block in range(2)}
    calls = [(id(mixture) in live, chosen) for mixture, chosen in seen if not chosen.is_meta]
    merged, theirs = ([chosen for is_live, chosen in calls if is_live == kind] for kind in (True, False))
    assert len(theirs) == 2 * 4  # both blocks, and the batches of two tasks, of which the first is split
    assert all(any(torch.equal(chosen, own) for own in merged) for chosen in theirs)
