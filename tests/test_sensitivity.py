from functools import partial

import torch
from conftest import recipe_for

from epmq.batches import encode
from epmq.pipeline import _expert_head
from epmq.prepare import prepare
from epmq.sensitivity import sensitivities
from epmq.spec import load_recipe
from epmq.streams import Calibration

CPU = torch.device("cpu")


def calibration(job, task):
    expert = next(expert for expert in job.recipe.experts if expert.name == task)
    batches = list(encode(job.calibration[task], job.processor, 8, 16))
    return Calibration(task, batches, partial(_expert_head, job.sources, expert))


def test_the_metric_is_that_of_plain_autograd(pool):
    """Blocks that load for each call and run anew backwards give the gradients of a model in memory."""
    job = prepare(load_recipe(recipe_for(pool)))
    part = calibration(job, "two")
    found = sensitivities(job.sources, part, CPU)
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
    for name, sketch in found.items():
        rows = kept[name].grad.flatten(0, 1)
        assert rows[batch["attention_mask"].flatten() == 0].abs().max() == 0, "padding reaches no score"
        wanted = rows.T @ rows
        torch.testing.assert_close(sketch.T @ sketch, wanted / wanted.diagonal().mean(), rtol=1e-4, atol=1e-5)
