import torch
from conftest import recipe_for

from epmq.batches import encode
from epmq.blocks import hooks, linears
from epmq.moments import Moments
from epmq.pipeline import prepare
from epmq.skeleton import load_model
from epmq.spec import load_recipe
from epmq.streams import Calibration, ExpertStream


@torch.no_grad()
def test_a_stream_sees_what_the_experts_own_layers_see(pool):
    job = prepare(load_recipe(recipe_for(pool, quantize={"method": "expert_guided", "expert_features": 0.5})))
    batches = list(encode(job.calibration["two"], job.processor, 8, 16))
    stream = ExpertStream(job.sources, Calibration("two", batches), torch.device("cpu"))
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    for index in range(2):
        block = f"encoder.layer.{index}"
        names = [name for name, _ in linears(expert.get_submodule(block))]
        stream.enter(block, names)
        for i, batch in enumerate(batches):
            seen: dict[str, torch.Tensor] = {}

            def keep(name, seen=seen):
                return lambda module, args: seen.__setitem__(name, args[0])

            pairs = [(expert.get_submodule(f"{block}.{name}"), keep(name)) for name in names]
            with hooks(pairs):
                expert(**batch)
            stream.run(i)
            for name in names:
                (inputs,) = stream.inputs[name]
                assert torch.equal(inputs, seen[name]), f"{block}.{name}"
        stream.leave()
        assert all(parameter.is_meta for parameter in stream.step.block.parameters())


def test_drift_is_the_mixed_moment():
    """W_k M − A G with M of the mixed inputs equals the correction made of G and the drift."""
    inputs, own = torch.randn(40, 8).double(), torch.randn(40, 8).double()
    merged, expert, alpha = torch.randn(3, 8).double(), torch.randn(3, 8).double(), 0.3
    moments = Moments(8)
    moments.add(inputs, expert=own)
    mixed = (1 - alpha) * inputs + alpha * own
    wanted = expert @ (mixed.T @ inputs) / 40 - merged @ (inputs.T @ inputs) / 40
    found = (expert - merged).float() @ moments.gram + alpha * expert.float() @ moments.drift
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
