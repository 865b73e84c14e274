"""Weights and inputs that no model should have: they are handled, or refused with the layer's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_for
from safetensors.torch import load_file, save_file

from epmq import load
from epmq.pipeline.run import run

LAYER = "encoder.layer.1.intermediate.dense"
NORM = "encoder.layer.0.output.LayerNorm"
SETTINGS: list[dict[str, Any]] = [
    {"method": "rtn"},
    {"method": "gptq"},
    {"method": "e_pmq"},
    {"method": "expert_guided"},
    {"method": "expert_guided", "bits": 2, "group_size": 32, "symmetric": False, "expert_features": 0.6},
]


@pytest.fixture
def spoiled(pool: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe over the pool with every model's tensors changed."""

    def spoil(change: Callable[[dict[str, torch.Tensor]], None], settings: dict[str, Any], **fields: Any) -> Any:
        for folder in ("base", "experts/one", "experts/two"):
            for file in (pool / folder).iterdir():
                target = tmp_path / folder / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if file.name == "model.safetensors":
                    tensors = load_file(file)
                    change(tensors)
                    save_file(tensors, target, metadata={"format": "pt"})
                else:
                    target.write_bytes(file.read_bytes())
        if not (tmp_path / "data").exists():
            (tmp_path / "data").symlink_to(pool / "data")
        return recipe_for(tmp_path, output=str(tmp_path / "out"), quantize=settings, **fields)

    return spoil


def zero_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"].zero_()


def zero_everything(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("encoder.layer.1") and tensor.ndim == 2:
            tensor.zero_()


def dead_inputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"][:40] = 0
    tensors[f"{NORM}.bias"][:40] = 0


def constant_inputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"].zero_()


def all_dead(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"].zero_()
    tensors[f"{NORM}.bias"].zero_()


def input_outliers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"][3] = 1e4


def weight_outliers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"][5, 7] = 1e4


def huge_inputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"].fill_(1e8)


def tiny_inputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"].fill_(1e-12)
    tensors[f"{NORM}.bias"].fill_(0)


HANDLED = [
    zero_layer,
    zero_everything,
    dead_inputs,
    constant_inputs,
    all_dead,
    input_outliers,
    weight_outliers,
    huge_inputs,
    tiny_inputs,
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("change", HANDLED, ids=lambda change: change.__name__)
def test_odd_numbers_are_handled(spoiled, tmp_path, change, settings):
    report = run(spoiled(change, settings), progress=False, evaluate=False)
    model = load(tmp_path / "out")
    ids = torch.randint(5, 19, (2, 8))
    assert torch.isfinite(model.backbone(input_ids=ids).last_hidden_state).all()
    assert all(layer["loss"] is None or 0 <= layer["loss"] < float("inf") for layer in report["layers"])


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NORM}.weight"].fill_(1e30)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=lambda s: "-".join(map(str, s.values())))
def test_inputs_that_overflow_name_the_layer(spoiled, tmp_path, settings):
    with pytest.raises(ValueError, match=r"^encoder\.layer\.[01]\..*NaN or Inf"):
        run(spoiled(overflow, settings), progress=False, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_what_overflows_in_half_precision_is_computed_in_single_and_noted(spoiled, tmp_path):
    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
        tensors[f"{NORM}.weight"].fill_(6e4)  # three of those are more than float16 holds

    for settings in SETTINGS[1:]:
        output = tmp_path / f"out-{'-'.join(map(str, settings.values()))}"
        report = run({**spoiled(beyond, settings), "output": str(output)}, progress=False, evaluate=False)
        notes = [note for note in report["notes"] if "more than float16 holds" in note]
        assert any("encoder.layer.1.attention.self.query" in note for note in notes)
        assert not any("encoder.layer.0.attention.self" in note or "self.key" in note for note in notes)
        ids = torch.randint(5, 19, (2, 8))
        assert torch.isfinite(load(output).backbone(input_ids=ids).last_hidden_state).all()


def test_damping_that_was_raised_is_recorded(spoiled, tmp_path):
    recipe = spoiled(constant_inputs, {"method": "gptq", "damping": 1e-12})
    report = run(recipe, progress=False, evaluate=False)
    assert any("damping raised from 1e-12 to" in note and "encoder.layer.1" in note for note in report["notes"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"] == report["notes"]


def test_the_global_random_state_is_left_alone(pool, tmp_path):
    before = torch.get_rng_state()
    run(recipe_for(pool, output=str(tmp_path / "out"), merge={"method": "dare"}), progress=False)
    assert torch.equal(before, torch.get_rng_state())
