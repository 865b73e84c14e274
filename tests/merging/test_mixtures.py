"""Mixtures of experts are merged as any other tensors, in whichever form they lie on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import perturbed
from moe_families import MIXTURES
from safetensors.torch import load_file, save_file

import epmq
from epmq.errors import InputError
from epmq.merging.matrices import tsv_m

Tensors = dict[str, torch.Tensor]


def write_all(folder: Path, family: str, fused: tuple[str, ...] = ()) -> dict[str, Tensors]:
    """Base and two experts on disk, those named in `fused` with one tensor for all experts of a mixture."""
    base = MIXTURES[family]()
    models = {"base": base, **{name: perturbed(copy.deepcopy(base), seed) for seed, name in enumerate(("one", "two"))}}
    for name, model in models.items():
        model.save_pretrained(folder / name, save_original_format=name not in fused)
    return {name: load_file(folder / name / "model.safetensors") for name in models}


def merged(folder: Path, **merge: Any) -> Tensors:
    recipe: dict[str, Any] = {"base": str(folder / "base"), "output": str(folder / "out"), "merge": merge}
    recipe["experts"] = [{"name": name, "model": str(folder / name)} for name in ("one", "two")]
    assert epmq.merge(recipe, progress=False)["notes"] == []
    return load_file(folder / "out" / "model.safetensors")


def by_hand(files: dict[str, Tensors], scaling: float) -> Tensors:
    base, one, two = (files[name] for name in ("base", "one", "two"))
    return {name: base[name] + scaling * (one[name] - base[name] + two[name] - base[name]) for name in base}


def check_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_merge_equals_the_merge_by_hand(family, tmp_path):
    files = write_all(tmp_path, family)
    check_equal(merged(tmp_path, method="task_arithmetic", scaling=0.4), by_hand(files, 0.4))


@pytest.mark.parametrize("fused", [("base",), ("one", "two"), ("base", "one", "two")])
def test_fused_tensors_and_matrices_are_one_model(fused, tmp_path):
    """The output has the base's form, and its numbers are those of the merge of matrices."""
    matrices = write_all(tmp_path / "plain", "mixtral")
    torch.manual_seed(0)
    files = write_all(tmp_path / "mixed", "mixtral", fused)
    assert ("model.layers.0.mlp.experts.gate_up_proj" in files["base"]) == ("base" in fused)
    check_equal(merged(tmp_path / "plain", method="task_arithmetic"), by_hand(matrices, 0.3))
    found = merged(tmp_path / "mixed", method="task_arithmetic")
    assert found.keys() == files["base"].keys()
    one, other = (
        type(MIXTURES["mixtral"]()).from_pretrained(tmp_path / name / "out").state_dict() for name in ("plain", "mixed")
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_matrix_merge_sees_the_matrix_of_each_expert(family, tmp_path):
    files = write_all(tmp_path, family)
    found = merged(tmp_path, method="tsv_m", scaling=1.0)
    path = "model.layers.1.mlp.experts"
    name, turn = (f"{path}.2.up_proj.weight", False) if family == "qwen3_moe" else (f"{path}.gate_up_proj", True)
    base, one, two, out = (
        (tensors[name][2, :, 1::2].T if turn else tensors[name]) for tensors in [*files.values(), found]
    )
    torch.testing.assert_close(out, base + tsv_m([one - base, two - base]), atol=1e-5, rtol=0)


def change(folder: Path, edit: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_is_lost_or_there_twice_is_an_error(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_all(tmp_path, "qwen3_moe", fused=("two",))
    change(tmp_path / "two", lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)}))
    with pytest.raises(InputError, match=rf"two: tensor '{name}' is \[8, 64, 32\], and its config says 4 experts"):
        merged(tmp_path, method="average")
    write_all(tmp_path, "qwen3_moe")
    change(tmp_path / "two", lambda tensors: tensors.update({name: torch.zeros(4, 64, 32)}))
    with pytest.raises(InputError, match=r"are both model\.layers\.0\.mlp\.experts\.\d\.\w+_proj\.weight"):
        merged(tmp_path, method="average")
    write_all(tmp_path, "qwen3_moe")
    matrix = "model.layers.0.mlp.experts.3.down_proj.weight"
    change(tmp_path / "one", lambda tensors: tensors.pop(matrix))
    with pytest.raises(InputError, match=rf"expert one: tensor '{matrix}' is missing"):
        merged(tmp_path, method="average")
    write_all(tmp_path, "qwen3_moe")
    more = matrix.replace(".3.", ".4.")
    change(tmp_path / "one", lambda tensors: tensors.update({more: tensors[matrix].clone()}))
    with pytest.raises(InputError, match=rf"expert one: tensor '{more}' has no counterpart in the base"):
        merged(tmp_path, method="average")


@pytest.mark.parametrize("fused", [(), ("base",)])
def test_an_adapter_may_change_the_matrix_of_an_expert(fused, tmp_path):
    files = write_all(tmp_path, "qwen3_moe", fused)
    name, shape = "model.layers.0.mlp.experts.1.up_proj", (32, 32)
    factors = {"A": torch.randn(2, shape[1]), "B": torch.randn(shape[0], 2)}
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    stored = {f"base_model.model.{name}.lora_{part}.weight": factor for part, factor in factors.items()}
    save_file(stored, tmp_path / "lora" / "adapter_model.safetensors")
    recipe: dict[str, Any] = {"base": str(tmp_path / "base"), "output": str(tmp_path / "out")}
    recipe |= {"experts": [{"name": "lora", "model": str(tmp_path / "lora")}]}
    recipe |= {"merge": {"method": "task_arithmetic", "scaling": 1.0}}
    epmq.merge(recipe, progress=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = dict(files["base"])
    place = expected["model.layers.0.mlp.experts.gate_up_proj"][1, 32:] if fused else expected[f"{name}.weight"]
    place += factors["B"] @ factors["A"]
    check_equal(found, expected)
