import copy
from functools import partial

import pytest
import torch
from conftest import perturbed, recipe_for
from families import FAMILIES

from epmq.batches import encode
from epmq.blocks import input_groups
from epmq.pipeline import _expert_head
from epmq.prepare import prepare
from epmq.residual import find_sums
from epmq.sensitivity import EXAMPLES, _some, leading, sensitivities
from epmq.sources import Sources
from epmq.spec import load_recipe
from epmq.streams import Calibration
from epmq.walk import Walk

CPU = torch.device("cpu")


def calibration(job, task):
    expert = next(expert for expert in job.recipe.experts if expert.name == task)
    batches = list(encode(job.calibration[task], job.processor, 8, 16))
    return Calibration(task, batches, partial(_expert_head, job.sources, expert))


def test_the_metric_is_that_of_plain_autograd(pool):
    """Blocks that load for each call and run anew backwards give the gradients of a model in memory."""
    job = prepare(load_recipe(recipe_for(pool)))
    part = calibration(job, "two")
    found = sensitivities(job.sources, [part], CPU)["two"]
    layers = ["attention.output.dense", "output.dense"]
    assert set(found) == {f"encoder.layer.{i}.{layer}" for i in range(2) for layer in layers}

    model, kept = job.sources.whole_model("two", CPU), {}
    model.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for name in found:
        hook = partial(lambda name, module, args, output: kept.update({name: output}) or output.retain_grad(), name)
        model.get_submodule(name).register_forward_hook(hook)
    batch = part.batches[0]
    scores = part.head(model).logits(model(**batch).last_hidden_state, batch["attention_mask"])
    draw = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    (scores * (draw - draw.mean(-1, keepdim=True))).sum().backward()
    for name, metric in found.items():
        rows = kept[name].grad.flatten(0, 1)
        assert rows[batch["attention_mask"].flatten() == 0].abs().max() == 0, "padding reaches no score"
        wanted = rows.T @ rows
        assert metric.rest == 0
        torch.testing.assert_close(metric.rows.T @ metric.rows, wanted / wanted.diagonal().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_that_writes_to_the_stream_has_one(family, tmp_path):
    """In every family: the layers that `find_sums` finds are among those whose gradients were noted."""
    base = FAMILIES[family].build()
    for seed, name in enumerate(("base", "one")):
        perturbed(copy.deepcopy(base), seed, seed * 0.02).save_pretrained(tmp_path / name)
    experts = [{"name": "one", "model": str(tmp_path / "one")}]
    sources = Sources(load_recipe({"base": str(tmp_path / "base"), "experts": experts}))
    batches = FAMILIES[family].batches()
    found = sensitivities(sources, [Calibration("one", batches)], CPU)["one"]
    for metric in found.values():
        assert metric.rows.square().sum(0).mean() == pytest.approx(1, rel=1e-4)
    model = sources.whole_model("one", CPU)
    for step in Walk(model, batches[:1]):
        groups = input_groups(step.block, lambda step=step: step.run(0))
        alone = [group.names[0] for group in groups if len(group.names) == 1]
        for name in find_sums(step.block, alone, lambda step=step: step.run(0)):
            assert f"{step.name}.{name}" in found
        step.finish()


def test_what_is_not_kept_of_a_metric_is_spread_over_the_rest():
    turn = torch.linalg.qr(torch.randn(40, 40)).Q
    values = torch.cat([torch.linspace(20, 4, 10), torch.linspace(0.3, 0.1, 30)])
    metric = leading(turn * values @ turn.T, 10)
    assert metric.rows.shape == (10, 40) and metric.rest == pytest.approx(0.2, rel=1e-2)
    found = metric.rows.T @ metric.rows + metric.rest * torch.eye(40)
    assert found.trace() == pytest.approx(float(values.sum()), rel=1e-4)
    wanted = torch.cat([values[:10], torch.full((30,), 0.2)])
    torch.testing.assert_close(found, turn * wanted @ turn.T, rtol=0, atol=0.05)


def test_a_large_vocabulary_takes_fewer_examples():
    batch = {"input_ids": torch.zeros(64, 100, dtype=torch.long), "attention_mask": torch.ones(64, 100)}
    assert len(_some(batch, 0)["input_ids"]) == EXAMPLES
    assert len(_some(batch, 2**26 // 500)["attention_mask"]) == 5
    assert len(_some(batch, 2**30)["input_ids"]) == 1
