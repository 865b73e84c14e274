"""Mixtures of experts through the whole pipeline: merge, expert-guided 4 bits, export, reload."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import padded_batches, perturbed
from moe_families import EXPERTS, MIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import epmq
from epmq.calibration import mixture as calibrated_mixture
from epmq.errors import InputError
from epmq.models.mixtures import is_fused
from epmq.pipeline import opening
from epmq.pipeline.cost import dry_run
from epmq.pipeline.journal import Journal
from epmq.pipeline.run import run
from tests.kit.runs import contents

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
CALIBRATION = {"one": padded_batches(3), "two": padded_batches(1)}


def recipe_of(family: str, folder: Path, output: str = "out", **fields: Any) -> dict[str, Any]:
    """Base and two experts of a family on disk, and a recipe over them."""
    base = MIXTURES[family]()
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        perturbed(copy.deepcopy(base), seed).save_pretrained(folder / name)
    experts = [{"name": name, "model": str(folder / name)} for name in ("one", "two")]
    quantize = fields.pop("quantize", {"expert_features": 0.5})
    recipe = {"base": str(folder / "base"), "experts": experts, "output": str(folder / output), "quantize": quantize}
    return {**recipe, **fields}


def routed_tokens(model: Any) -> dict[str, int]:
    """How many real tokens the router of transformers' own model sends to each expert of each mixture."""
    counts, mask = dict[str, int](), torch.empty(0)

    def count(path: str, args: tuple[torch.Tensor, ...]) -> None:
        chosen = args[1].view(-1, args[1].shape[-1])[mask.flatten().bool()]
        for expert in range(EXPERTS):
            name = f"{path}.{expert}"
            counts[name] = counts.get(name, 0) + int((chosen == expert).sum())

    fused = [(path, module) for path, module in model.named_modules() if is_fused(module)]
    hooks = [module.register_forward_pre_hook(lambda _, args, path=path: count(path, args)) for path, module in fused]
    for batches in CALIBRATION.values():
        for batch in batches:
            mask = batch["attention_mask"]
            model(**batch)
    for hook in hooks:
        hook.remove()
    return counts


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**CALIBRATION["one"][0]).logits
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in MIXTURES if name != "granite"])
def test_each_expert_is_calibrated_on_the_tokens_that_reach_it(family, tmp_path):
    report = run(recipe_of(family, tmp_path), calibration=CALIBRATION, **QUIET)
    layers = {layer["name"]: layer for layer in report["layers"]}
    loaded = epmq.load(tmp_path / "out").backbone
    counts = routed_tokens(loaded)
    total = sum(int(batch["attention_mask"].sum()) for batches in CALIBRATION.values() for batch in batches)
    for expert, tokens in counts.items():
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = layers.pop(f"{expert}.{name}")
            assert layer["tokens"] == tokens and layer["bits"] == 4 and layer["loss"] is not None, expert
            assert ("pooled" in layer) == (tokens < 8)  # a quarter of 32 inputs
    assert all(layer["tokens"] == total for name, layer in layers.items() if ".layers." in name)
    assert not any(name.endswith((".gate", ".router", "_gate")) for name in layers)  # what chooses stays as it is

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".experts.3." in name and name.endswith("weight_packed")]
    assert len(names) == 3 * (len(counts) // EXPERTS)
    packed = epmq.load(tmp_path / "out", weights="packed-exact").backbone
    # Where transformers turns the fused experts, products are summed in another order.
    torch.testing.assert_close(logits(packed), logits(loaded), rtol=0, atol=1e-7 if family == "gpt_oss" else 0)
    assert not torch.equal(logits(loaded), logits(MIXTURES[family]()))
    if family == "gpt_oss":  # transformers has no form of it with matrices
        assert any("cannot open this packed model" in note for note in report["notes"])
    else:
        direct = type(loaded).from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(logits(direct), logits(loaded), atol=1e-3, rtol=0)  # it unpacks in float16
    assert any("saw too few tokens" in note for note in report["notes"]) == any(n < 8 for n in counts.values())


@torch.no_grad()
def test_experts_that_a_base_names_after_other_layers_are_read_again(tmp_path):
    # Its files call the fused tensors input_linear and output_linear.
    recipe = recipe_of("granite", tmp_path, output="packed", quantize={"method": "rtn"})
    run(recipe, **QUIET)
    run({**recipe, "output": str(tmp_path / "plain"), "format": "dequantized"}, **QUIET)
    packed, plain = (epmq.load(tmp_path / name).backbone for name in ("packed", "plain"))
    assert torch.equal(logits(packed), logits(plain))


def test_weights_that_no_layer_reads_are_an_error(tmp_path):
    run(recipe_of("granite", tmp_path, quantize={"method": "rtn"}), **QUIET)
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name.replace(".experts.", ".masters."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"masters\.\d\.\w+\.weight is read by no layer of GraniteMoeForCausalLM"):
        epmq.load(tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dequantized_weights_have_the_bases_form(family, tmp_path):
    recipe = recipe_of(family, tmp_path, quantize={"method": "gptq", "rest": "as-stored"})
    run(recipe, calibration=CALIBRATION, **QUIET)
    run({**recipe, "format": "dequantized", "output": str(tmp_path / "plain")}, calibration=CALIBRATION, **QUIET)
    base, plain = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("base", "plain"))
    assert base == plain
    loaded = epmq.load(tmp_path / "out").backbone
    assert torch.equal(logits(type(loaded).from_pretrained(tmp_path / "plain").eval()), logits(loaded))


@pytest.mark.parametrize("largest", [opening.LARGEST, 0])
def test_what_transformers_cannot_open_is_said_before(largest, tmp_path, monkeypatch):
    """Of a large model by its shapes alone, that is without the memory that its experts would take."""
    monkeypatch.setattr(opening, "LARGEST", largest)
    recipe = recipe_of("gpt_oss", tmp_path, quantize={"method": "rtn", "symmetric": False, "embeddings": 16})
    notes = dry_run(recipe, progress=False).notes
    assert any("cannot open this packed model" in note for note in notes)
    recipe = recipe_of(
        "olmoe", tmp_path, quantize={"method": "rtn", "overrides": [{"layers": "re:.*experts.*", "bits": 8}]}
    )
    assert dry_run(recipe, progress=False).notes == []


PLAIN = [
    {"merge": {"method": "regmean"}, "quantize": {"method": "none"}},
    {"quantize": {"method": "gptq", "overrides": [{"layers": "re:.*experts.*", "skip": True}], "rest": "as-stored"}},
]


@pytest.mark.parametrize("fields", PLAIN)
def test_what_is_not_quantized_stays_fused(fields, tmp_path):
    run(recipe_of("gpt_oss", tmp_path, **fields), calibration=CALIBRATION, **QUIET)
    base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert {name for name in base if ".experts." in name} == {name for name in out if ".experts." in name}
    loaded, name = epmq.load(tmp_path / "out").backbone, "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(loaded.get_parameter(name), out[name])


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    recipe = recipe_of("qwen2_moe", tmp_path)
    run({**recipe, "output": str(tmp_path / "whole")}, calibration=CALIBRATION, **QUIET)
    append = Journal.append

    def stop(journal: Journal, name: str, reports: Any) -> None:
        if len(journal) == 2:
            raise KeyboardInterrupt
        append(journal, name, reports)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, calibration=CALIBRATION, **QUIET)
    report = run(recipe, calibration=CALIBRATION, **QUIET)
    assert "1 of 3 blocks were finished by a run that was stopped" in report["notes"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_too_little_is_solved_on_others_of_its_mixture(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated_mixture, "FEWEST", 1.2)  # of 32 inputs
    report = run(recipe_of("olmoe", tmp_path, quantize={"method": "gptq"}), calibration=CALIBRATION, **QUIET)
    experts = [layer for layer in report["layers"] if ".experts." in layer["name"]]
    few = [layer for layer in experts if layer["tokens"] < 39]
    assert few and all(("pooled" in layer) == (layer in few) for layer in experts)
    assert all(layer["tokens"] + layer["pooled"] >= 64 for layer in few)
    none = sum(not layer["tokens"] for layer in few) // 3
    assert f"{len(few) // 3} experts of mixtures saw too few tokens ({none} saw none)" in " ".join(report["notes"])


def test_a_dry_run_says_what_the_run_does(tmp_path):
    recipe = recipe_of("qwen3_moe", tmp_path)
    plan = dry_run(recipe, calibration=CALIBRATION, progress=False)
    report = run(recipe, calibration=CALIBRATION, **QUIET)
    assert plan.output_bytes == report["bytes"] and plan.layers == len(report["layers"])
    assert plan.notes == report["notes"]


def test_bits_are_chosen_layer_by_layer(tmp_path):
    recipe = recipe_of("qwen3_moe", tmp_path, quantize={"method": "gptq", "budget": 6.5})
    report = run(recipe, calibration=CALIBRATION, **QUIET)
    assert report["bits_per_weight"] <= 6.5
    assert len({layer["bits"] for layer in report["layers"] if ".experts." in layer["name"]}) > 1
