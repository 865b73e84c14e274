"""A merge without quantization."""

from typing import Any

import pytest
import torch
from checkpoints import edit_weights, weights, with_nan
from conftest import recipe_for
from transformers import BertModel

import epmq
from epmq.merging import entrywise
from epmq.pipeline.run import merge

MERGES: list[dict[str, Any]] = [
    {"method": "average"},
    {"method": "average", "weights": [1, 3]},
    {"method": "task_arithmetic", "scaling": 0.4},
    {"method": "task_arithmetic", "scaling": [0.2, 0.7]},
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.3, "trim": "tensor", "scaling": 0.5},
    {"method": "dare", "density": 0.4},
    {"method": "dare", "combine": "ties"},
]


def merged_by_hand(base: dict, experts: list[dict], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `merge` should write, from whole state dicts."""
    tau = [{name: expert[name] - base[name] for name in base} for expert in experts]
    method = settings["method"]
    if method == "average":
        share = torch.tensor(settings.get("weights", [1, 1])).float()
        share /= share.sum()
        return {name: sum(s * expert[name] for s, expert in zip(share, experts)) for name in base}
    if method == "task_arithmetic":
        scaling = settings["scaling"]
        scaling = scaling if isinstance(scaling, list) else [scaling] * 2
        return {name: base[name] + sum(s * t[name] for s, t in zip(scaling, tau)) for name in base}
    if method == "dare":
        extra = {key: value for key, value in settings.items() if key != "method"}
        return {name: entrywise.dare(base[name], [e[name] for e in experts], name=name, **extra) for name in base}
    merged = {}
    whole = [torch.cat([vector.flatten() for vector in t.values()]).abs().sort(descending=True).values for t in tau]
    for name in base:
        kept = []
        for t, ranked in zip(tau, whole):
            if settings.get("trim") == "tensor":
                ranked = t[name].flatten().abs().sort(descending=True).values
            keep = int(settings["density"] * len(ranked))
            kept.append(torch.where(t[name].abs() >= ranked[keep - 1], t[name], 0.0))
        sign = torch.where(kept[0] + kept[1] >= 0, 1.0, -1.0)
        agree = [(vector.sign() == sign).float() for vector in kept]
        total = sum(vector * same for vector, same in zip(kept, agree))
        merged[name] = base[name] + settings.get("scaling", 1.0) * total / (agree[0] + agree[1]).clamp(min=1)
    return merged


@pytest.mark.parametrize("settings", MERGES, ids=str)
def test_merging_a_checkpoint_is_merging_its_tensors(pool, tmp_path, settings):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), merge=settings)
    report = merge(recipe, progress=False)
    written = weights(tmp_path / "out")
    experts = [weights(expert["model"]) for expert in recipe["experts"]]
    expected = merged_by_hand(weights(recipe["base"]), experts, settings)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert report["layers"] == [] and report["loss"] == 0 and "scores" not in report
    assert report["recipe"]["quantize"]["method"] == "none"
    BertModel.from_pretrained(tmp_path / "out")


MATRIX_MERGES = [{"method": "wudi"}, {"method": "tsv_m"}]


@pytest.mark.parametrize("settings", [*MERGES[::2], *MATRIX_MERGES], ids=str)
@pytest.mark.parametrize("change", [with_nan, lambda tensor: tensor.fill_(float("nan"))], ids=["one", "all"])
def test_a_mere_merge_names_what_is_not_finite(own_pool, tmp_path, settings, change):
    """It looks while it merges."""
    edit_weights(own_pool / "experts" / "two", encoder__layer__1__output__dense__weight=change)
    with pytest.raises(ValueError, match=r"two/model\.safetensors: tensor 'encoder\.layer\.1\..* NaN or Inf"):
        merge(recipe_for(own_pool, output=str(tmp_path / "out"), merge=settings), progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["pool"]


def test_merging_needs_no_calibration_data(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    for expert in recipe["experts"]:
        del expert["calibration"], expert["evaluation"]
    merge(recipe, progress=False)
    assert epmq.load(tmp_path / "out").tasks == ["one", "two"]


def test_the_order_of_experts_does_not_matter(pool, tmp_path):
    recipe = recipe_for(
        pool, output=str(tmp_path / "there"), merge={"method": "task_arithmetic", "scaling": [0.2, 0.6]}
    )
    merge(recipe, progress=False)
    back = {
        "experts": recipe["experts"][::-1],
        "merge": {"method": "task_arithmetic", "scaling": [0.6, 0.2]},
        "output": str(tmp_path / "back"),
    }
    merge({**recipe, **back}, progress=False)
    there, back = weights(tmp_path / "there"), weights(tmp_path / "back")
    for name, tensor in there.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-7)
