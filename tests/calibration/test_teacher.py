from contextlib import ExitStack

import pytest
import torch
from conftest import recipe_for

from epmq.calibration.teacher import Calibration, Teacher
from epmq.data.encoding import encode
from epmq.models.blocks import linears
from epmq.models.heads import Head
from epmq.models.hooks import watch
from epmq.models.loading import load_model
from epmq.pipeline.run import prepare
from epmq.quantization.hessian import Moments
from epmq.recipe_file import load_recipe


@torch.no_grad()
def test_a_stream_sees_what_the_expert_itself_computes(pool):
    job = prepare(load_recipe(recipe_for(pool, quantize={"method": "expert_guided", "expert_features": 0.5})))
    batches = list(encode(job.calibration["two"], job.processor, 8, 16))
    stream = Teacher(job.sources, Calibration("two", batches), torch.device("cpu"))
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    for index in range(2):
        block = f"encoder.layer.{index}"
        names = [name for name, _ in linears(expert.get_submodule(block))]
        places = [*names, "output.LayerNorm", None]
        stream.run(block, 2 * places)
        assert all(parameter.is_meta for parameter in stream.step.block.parameters())
        for i, batch in enumerate(batches):
            with ExitStack() as stack:
                seen = {place: [] for place in places}
                for place in places:
                    stack.enter_context(watch(expert.get_submodule(block), place, seen[place].append))
                expert(**batch)
            for place in places:
                for _ in range(2):
                    assert torch.equal(stream.take(i, place)[0], seen[place][0]), f"{block}, {place}"
        stream.advance()
    with pytest.raises(RuntimeError, match="two is at its end"):
        stream.run("encoder.layer.2", [])


@torch.no_grad()
def test_an_expert_scores_its_batches_when_it_is_done(pool):
    job = prepare(load_recipe(recipe_for(pool)))
    batches, head = list(encode(job.calibration["two"], job.processor, 8, 16)), Head(torch.randn(3, 64), torch.randn(3))
    stream = Teacher(job.sources, Calibration("two", batches, lambda model: head), torch.device("cpu"))
    stream.run("encoder.layer.0", [])
    stream.advance()
    stream.run("encoder.layer.1", [])
    stream.advance()
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    wanted = [head.logits(expert(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches]
    for _ in range(2):
        torch.testing.assert_close(stream.scores(), torch.cat(wanted))


def test_drift_is_the_mixed_moment():
    """W_k M − A G with M of the mixed inputs equals the correction made of G and the drift."""
    inputs, own = torch.randn(40, 8).double(), torch.randn(40, 8).double()
    merged, expert, alpha = torch.randn(3, 8).double(), torch.randn(3, 8).double(), 0.3
    moments = Moments(8)
    moments.add(inputs, drift=own - inputs)
    mixed = (1 - alpha) * inputs + alpha * own
    wanted = expert @ (mixed.T @ inputs) / 40 - merged @ (inputs.T @ inputs) / 40
    found = (expert - merged).float() @ moments.gram + alpha * expert.float() @ moments.input_drift
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_holds_only_the_words_it_reads(pool):
    job = prepare(load_recipe(recipe_for(pool, quantize={"method": "expert_guided"})))
    batches = list(encode(job.calibration["two"], job.processor, 8, 16))
    stream = Teacher(job.sources, Calibration("two", batches), torch.device("cpu"))
    words = stream.model.get_input_embeddings()
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    seen: set[int] = set()
    for batch in batches:
        found, wanted = (model(batch["input_ids"]) for model in (words, expert.get_input_embeddings()))
        assert torch.equal(found, wanted)
        seen |= set(batch["input_ids"].flatten().tolist())
        assert len(words.weight) == len(seen) < words.num_embeddings
