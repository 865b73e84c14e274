from contextlib import ExitStack

import torch
from conftest import recipe_for

from epmq.batches import encode
from epmq.blocks import linears
from epmq.moments import Moments
from epmq.pipeline import prepare
from epmq.residual import at
from epmq.skeleton import load_model
from epmq.spec import load_recipe
from epmq.streams import Calibration, ExpertStream, run_until
from epmq.walk import Walk


@torch.no_grad()
def test_a_stream_sees_what_the_expert_itself_computes(pool):
    job = prepare(load_recipe(recipe_for(pool, quantize={"method": "expert_guided", "expert_features": 0.5})))
    batches = list(encode(job.calibration["two"], job.processor, 8, 16))
    stream = ExpertStream(job.sources, Calibration("two", batches), torch.device("cpu"))
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    for index in range(2):
        block = f"encoder.layer.{index}"
        names = [name for name, _ in linears(expert.get_submodule(block))]
        places = {**dict.fromkeys(names, 1), "output.LayerNorm": 1, None: 1}
        early, late = dict.fromkeys(names[:3], 1), dict.fromkeys(places, 1)
        for last, wanted in ((False, early), (True, late)):  # a block may be entered more than once
            stream.enter(block)
            for i, batch in enumerate(batches):
                with ExitStack() as stack:
                    seen = {place: [] for place in wanted}
                    for place in wanted:
                        stack.enter_context(at(expert.get_submodule(block), place, seen[place].append))
                    expert(**batch)
                found = stream.run(i, wanted, last)
                for place in wanted:
                    assert torch.equal(found[place][0], seen[place][0]), f"{block}, {place}"
            stream.leave()
            assert all(parameter.is_meta for parameter in stream.step.block.parameters())
        stream.advance()


def test_a_block_runs_no_further_than_asked(pool):
    job = prepare(load_recipe(recipe_for(pool, quantize={"method": "gptq"})))
    batch = next(encode(job.calibration["two"], job.processor, 8, 16))
    model, seen = job.sources.whole_model("two", torch.device("cpu")), []
    step = next(iter(Walk(model, [batch])))
    with at(step.block, "attention.output.dense", seen.append), at(step.block, "intermediate.dense", seen.append):
        run_until(step, 0, {"attention.self.query": 1, "attention.output.dense": 1})
    assert len(seen) == 1


def test_drift_is_the_mixed_moment():
    """W_k M − A G with M of the mixed inputs equals the correction made of G and the drift."""
    inputs, own = torch.randn(40, 8).double(), torch.randn(40, 8).double()
    merged, expert, alpha = torch.randn(3, 8).double(), torch.randn(3, 8).double(), 0.3
    moments = Moments(8)
    moments.add(inputs, beside=own - inputs)
    mixed = (1 - alpha) * inputs + alpha * own
    wanted = expert @ (mixed.T @ inputs) / 40 - merged @ (inputs.T @ inputs) / 40
    found = (expert - merged).float() @ moments.gram + alpha * expert.float() @ moments.cross
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_holds_only_the_words_it_reads(pool):
    job = prepare(load_recipe(recipe_for(pool, quantize={"method": "expert_guided"})))
    batches = list(encode(job.calibration["two"], job.processor, 8, 16))
    stream = ExpertStream(job.sources, Calibration("two", batches), torch.device("cpu"))
    words = stream.model.get_input_embeddings()
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    seen: set[int] = set()
    for batch in batches:
        found, wanted = (model(batch["input_ids"]) for model in (words, expert.get_input_embeddings()))
        assert torch.equal(found, wanted)
        seen |= set(batch["input_ids"].flatten().tolist())
        assert len(words.weight) == len(seen) < words.num_embeddings
