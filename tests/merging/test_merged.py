"""The merge as a reader of tensors."""

import copy

import pytest
import torch
from checkpoints import edit_weights, weights, with_nan
from conftest import perturbed, recipe_for, tiny_bert
from merges import open_folder, recipe_of

from epmq.merge_settings import Average, Dare, Ties
from epmq.merging.compatibility import open_experts
from epmq.merging.entrywise import dare, ties
from epmq.merging.merged import MergedWeights
from epmq.merging.methods import METHODS
from epmq.pipeline.run import merge
from epmq.recipe_file import load_recipe


@pytest.mark.parametrize("method", ["task_arithmetic", "average", "ties", "dare"])
def test_experts_of_other_dtypes_are_merged_in_float32(tmp_path, method):
    base = tiny_bert().bfloat16()
    base.save_pretrained(tmp_path / "base")
    perturbed(copy.deepcopy(base).float(), 1).save_pretrained(tmp_path / "one")
    perturbed(copy.deepcopy(base).float(), 2).half().save_pretrained(tmp_path / "two")
    settings = {"method": method, "density": 0.99999} if method == "dare" else {"method": method}
    merge(recipe_of(tmp_path, merge=settings), progress=False)
    found, base, one, two = (weights(tmp_path / name) for name in ("out", "base", "one", "two"))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    if method in ("ties", "dare"):
        return  # by hand in pipeline/test_merge, for one dtype
    for name, tensor in found.items():
        b, x, y = base[name].float(), one[name].float(), two[name].float()
        expected = (x + y) / 2 if method == "average" else b + 0.3 * (x - b) + 0.3 * (y - b)
        torch.testing.assert_close(tensor.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("merge", [{"method": "ties", "trim": "tensor"}, *({"method": method} for method in METHODS)])
def test_rows_at_a_time_give_the_same_merge(pool, monkeypatch, merge):
    """What a large tensor goes through, on small ones."""
    recipe = load_recipe(recipe_for(pool, merge=merge, quantize={"method": "none"}))
    opened = open_experts(recipe.base, recipe.experts)
    whole = MergedWeights(opened, recipe.merge)
    expected = {name: whole.tensor(name) for name in opened.names}
    monkeypatch.setattr("epmq.merging.merged.ROWS", 1000)
    pieces = MergedWeights(opened, recipe.merge)
    for name, tensor in expected.items():
        assert torch.equal(pieces.tensor(name), tensor), name
        assert torch.equal(torch.cat([part.reshape(-1) for part in pieces.parts(name)]), tensor.reshape(-1)), name


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_thresholds_are_those_of_whole_task_vectors(berts, trim):
    """Found when they are asked for first, or beforehand."""
    opened, settings = open_folder(berts), Ties(trim=trim, density=0.3)
    base = weights(berts / "base")
    tau = [{name: weights(berts / task)[name] - base[name] for name in opened.names} for task in ("one", "two")]
    merged, prepared = MergedWeights(opened, settings), MergedWeights(opened, settings)
    prepared.prepare()
    for name in ("encoder.layer.1.output.dense.weight", "pooler.dense.bias"):
        parts = [vectors.values() if trim == "model" else [vectors[name]] for vectors in tau]
        ranked = [torch.cat([part.flatten() for part in one]).abs().sort(descending=True).values for one in parts]
        thresholds = [float(one[int(0.3 * len(one)) - 1]) for one in ranked]
        experts = [weights(berts / task)[name] for task in ("one", "two")]
        expected = ties(base[name], experts, density=0.3, thresholds=thresholds)
        assert torch.equal(merged.tensor(name), expected) and torch.equal(prepared.tensor(name), expected)


def test_the_draw_of_dare_is_fixed_by_seed_and_name(berts):
    opened, name = open_folder(berts), "pooler.dense.weight"
    first, again, other = (MergedWeights(opened, Dare(), seed).tensor(name) for seed in (1, 1, 2))
    tensors = [opened.base.tensor(name), [expert.tensor(name) for expert in opened.experts.values()]]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, dare(*tensors, seed=1, name=name))


def test_what_is_not_finite_is_named(berts):
    edit_weights(berts / "two", pooler__dense__weight=with_nan)
    merged = MergedWeights(open_folder(berts), Average())
    assert merged.tensor("pooler.dense.bias").isfinite().all()
    with pytest.raises(ValueError, match=r"two/model\.safetensors: tensor 'pooler\.dense\.weight' has 1 NaN or Inf"):
        merged.tensor("pooler.dense.weight")
