"""Merges that fit linear layers on calibration data, against regression by hand."""

import pytest
import torch
from checkpoints import weights
from conftest import recipe_for

import epmq
from epmq.models.blocks import linears
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe

FIRST = "encoder.layer.0.attention.self.query"


def inputs_of(model, layer: str, batches) -> torch.Tensor:
    """What a layer receives at real tokens, [tokens, in]."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    masks = torch.cat([batch["attention_mask"].bool().flatten() for batch in batches])
    return torch.cat([one.flatten(0, 1) for one in seen])[masks].double()


def regression(rows: list[torch.Tensor], theirs: list[torch.Tensor], off_diagonal: float) -> torch.Tensor:
    """RegMean as published: (Σ G_k)⁻¹ Σ G_k W_k with smaller entries off the diagonals."""
    total, mixed = 0, 0
    for x, weight in zip(rows, theirs):
        gram = x.T @ x / len(x)
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
        total, mixed = total + gram, mixed + weight.double() @ gram
    return torch.linalg.solve(total, mixed.T).T


@pytest.fixture
def prepared(pool):
    run = prepare(load_recipe(recipe_for(pool, merge={"method": "regmean"}, quantize={"method": "none"})))
    return run.calibration, run.experts.experts, run.experts


def test_regmean_is_regression_on_each_experts_own_inputs(pool, tmp_path, prepared):
    batches, experts, opened = prepared
    fields = {"merge": {"method": "regmean", "off_diagonal": 0.7}, "quantize": {"method": "none"}}
    report = epmq.run(recipe_for(pool, output=str(tmp_path / "out"), **fields), progress=False, evaluate=False)
    found = weights(tmp_path / "out")
    assert report["bytes"] == sum(tensor.nbytes for tensor in found.values())
    models = {task: opened.whole_model(expert, torch.device("cpu")) for task, expert in experts.items()}
    own = [name for name, _ in linears(models["one"]) if name.startswith("encoder.layer")]
    assert len(own) == 12
    for layer in own:
        rows = [inputs_of(models[task], layer, batches[task]) for task in models]
        theirs = [model.get_submodule(layer).weight.detach() for model in models.values()]
        expected = regression(rows, theirs, 0.7).float()
        torch.testing.assert_close(found[f"{layer}.weight"], expected, rtol=1e-3, atol=1e-4, msg=layer)
    for name in ("embeddings.LayerNorm.weight", f"{FIRST}.bias"):
        mean = sum(expert.tensor(name) for expert in experts.values()) / len(experts)
        torch.testing.assert_close(found[name], mean)


def test_regmean_pp_reads_what_the_merged_model_gives(pool, tmp_path, prepared):
    batches, experts, _ = prepared
    fields = {"merge": {"method": "regmean_pp"}, "quantize": {"method": "none"}}
    epmq.run(recipe_for(pool, output=str(tmp_path / "out"), **fields), progress=False, evaluate=False)
    merged = epmq.load(tmp_path / "out").backbone
    layer = "encoder.layer.1.output.dense"  # behind all others
    rows = [inputs_of(merged, layer, batches[task]) for task in experts]
    theirs = [expert.tensor(f"{layer}.weight") for expert in experts.values()]
    expected = regression(rows, theirs, 0.9).float()
    torch.testing.assert_close(merged.get_submodule(layer).weight, expected, rtol=1e-3, atol=1e-4)


def test_codes_are_chosen_where_regmean_pp_was_fitted(pool, tmp_path):
    fields = {"merge": {"method": "regmean_pp"}, "quantize": {"method": "gptq", "bits": 8}}
    report = epmq.run(recipe_for(pool, output=str(tmp_path / "out"), **fields), progress=False, evaluate=False)
    fitted = [layer for layer in report["layers"] if layer["merge_loss"]]
    assert len(fitted) == 12 and all(layer["merge_loss"] > layer["loss"] > 0 for layer in fitted)


def test_a_mere_merge_needs_data_then(pool, tmp_path):
    fields = {"merge": {"method": "regmean"}, "quantize": {"method": "none"}}
    recipe = recipe_for(pool, output=str(tmp_path / "out"), **fields)
    epmq.run(recipe, progress=False, evaluate=False)
    epmq.pipeline.run.merge({**recipe, "output": str(tmp_path / "again")}, progress=False)
    one, two = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    for expert in recipe["experts"]:
        expert.pop("calibration", None)
    with pytest.raises(ValueError, match="calibration: regmean needs calibration data"):
        epmq.run({**recipe, "output": str(tmp_path / "other")}, progress=False)


@pytest.mark.parametrize("merge, quantize", [("regmean", "gptq"), ("regmean_pp", "rtn"), ("regmean", "expert_guided")])
def test_what_does_not_go_together_is_refused(pool, merge, quantize):
    with pytest.raises(ValueError, match=f"merge.method: {merge} goes with quantize.method: none"):
        load_recipe(recipe_for(pool, merge={"method": merge}, quantize={"method": quantize}))
