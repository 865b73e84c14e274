import pytest
import torch
from families import FAMILIES

from epmq.calibration.sequential import Batch, SequentialCalibrator
from epmq.models.blocks import input_groups, linears


def as_batches(inputs: list[dict[str, torch.Tensor]]) -> list[Batch]:
    return [Batch("", index, one) for index, one in enumerate(inputs)]


def groups_of(family: str) -> list[list[str]]:
    spec, of_blocks = FAMILIES[family], []
    for step in SequentialCalibrator(spec.build(), as_batches(spec.batches())):
        groups = input_groups(step.block, lambda step=step: step.run(0))
        assert sorted(name for group in groups for name in group.names) == sorted(n for n, _ in linears(step.block))
        of_blocks.append([group.names for group in groups])
        step.finish()
    return of_blocks


@torch.no_grad()
def test_layers_that_share_an_input_are_found():
    assert {frozenset(group) for group in groups_of("bert")[0]} == {
        frozenset(f"attention.self.{x}" for x in ("query", "key", "value")),
        frozenset({"attention.output.dense"}),
        frozenset({"intermediate.dense"}),
        frozenset({"output.dense"}),
    }
    assert len(groups_of("llama")[0]) == 4
    decoder = groups_of("t5")[-1]
    assert {frozenset(group) for group in decoder[:4]} == {
        frozenset({f"layer.0.SelfAttention.{x}" for x in "qkv"}),
        frozenset({"layer.0.SelfAttention.o"}),
        frozenset({"layer.1.EncDecAttention.q"}),
        frozenset({"layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"}),
    }


def embedded(family: str = "bert", count: int = 3):
    """A small model and batches of different lengths, so that what belongs to one batch cannot pass for another's.

    The first batch has padding.
    """
    model = FAMILIES[family].build()
    ids = [torch.randint(1, 32, (2 + i, 4 + i), generator=torch.Generator().manual_seed(i)) for i in range(count)]
    inputs = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    inputs[0]["attention_mask"][0, -1] = 0
    return model, as_batches(inputs)


@torch.no_grad()
def test_each_layer_runs_once_on_each_batch_and_sees_what_lies_before_it_changed():
    model, batches = embedded()
    layers = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    seen, calls = {}, []
    for linear in linears(model.encoder):
        linear[1].register_forward_hook(lambda module, args, output, name=linear[0]: calls.append(name))
    for step in SequentialCalibrator(model, batches):
        step.pause_before(layers, ["attention"])
        for layer in layers:
            for i in reversed(range(len(batches))):
                inputs = step.run_until(i, layer)
                assert step.run_until(i, layer) is inputs  # it waits there
                mask = step.padding_mask(inputs)
                assert mask is None if i else torch.equal(mask, batches[0].inputs["attention_mask"].bool())
                assert len(step.kept_input(i, "attention")) == len(batches[i].inputs["input_ids"])
                seen[step.name, layer, i] = inputs.clone()
            step.block.get_submodule(layer).weight.mul_(0.5)
            step.release(layer)
        step.finish()
    assert len(calls) == len(set(calls)) * len(batches)
    for block, layer, i in seen:
        received, module = [], model.get_submodule(f"{block}.{layer}")
        with module.register_forward_pre_hook(lambda module, args, received=received: received.append(args[0])):
            model(**batches[i].inputs)
        assert torch.equal(received[0], seen[block, layer, i]), (block, layer, i)


@torch.no_grad()
def test_a_block_can_be_tried_while_its_batches_wait():
    model, batches = embedded()
    for step in SequentialCalibrator(model, batches):
        step.pause_before(["output.dense"])
        for i in range(len(batches)):
            step.run_until(i, "output.dense")
        tried = [step.run(i) for i in range(len(batches))]
        step.finish()
        if step.name.endswith(".1"):
            for output, output_tried in zip(step.stack.outputs, tried):
                assert torch.equal(*(x if isinstance(x, torch.Tensor) else x[0] for x in (output, output_tried)))


@torch.no_grad()
def test_a_batch_that_does_not_come_by_a_layer_waits_for_none():
    model, batches = embedded(count=1)
    steps = iter(SequentialCalibrator(model, batches))
    step = next(steps)
    step.block.intermediate.forward = lambda hidden: hidden.new_ones(*hidden.shape[:-1], 128)
    step.pause_before(["attention.self.query", "intermediate.dense", "output.dense"])
    assert step.run_until(0, "intermediate.dense") is None  # the query lies ahead
    step.release("attention.self.query")
    assert step.run_until(0, "intermediate.dense") is None
    step.release("intermediate.dense")
    assert step.run_until(0, "output.dense") is not None
    step.release("output.dense")
    assert step.run_until(0, "output.dense") is None and step.finished


def test_grad_mode_is_left_alone_and_errors_come_through():
    model, batches = embedded()
    for step in SequentialCalibrator(model, batches):
        assert torch.is_grad_enabled()
        step.finish()
    assert torch.is_grad_enabled()
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in model.encoder.layer)
    model.encoder.layer[1].intermediate.forward = None
    with pytest.raises(TypeError):
        for step in SequentialCalibrator(model, batches):
            step.finish()
    assert all("forward" not in block.__dict__ for block in model.encoder.layer)


@torch.no_grad()
def test_what_nobody_asks_for_is_not_run_at_the_end():
    for outputs_for, on_finished in ((None, None), (1, None), (1, lambda batch: None)):
        model, batches = embedded()
        calls: list[str] = []
        for name, linear in linears(model.encoder):
            linear.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        calibrator = SequentialCalibrator(model, batches, on_finished, outputs_for=outputs_for)
        for step in calibrator:
            step.pause_before(["output.dense"])
            for batch in range(3):
                assert step.run_until(batch, "output.dense") is not None
            step.release("output.dense")
            step.finish()
        outputs = calibrator.stacks[0].outputs
        if outputs_for and not on_finished:
            assert outputs[1:] == [None, None] and calls.count("layer.1.output.dense") == 1
        assert calls.count("layer.0.output.dense") == 3
        torch.testing.assert_close(outputs[0][0], model(**batches[0].inputs).last_hidden_state[0])


def test_a_calibrator_goes_on_only_from_a_finished_block():
    model, batches = embedded()
    with pytest.raises(RuntimeError, match="went on without finish"):
        for _ in SequentialCalibrator(model, batches):
            pass


def test_a_forward_that_leaves_out_blocks_is_refused():
    model, batches = embedded()
    calibrator = SequentialCalibrator(model, batches)
    model.encoder.layer = model.encoder.layer[:1]
    with pytest.raises(ValueError, match="ended before all blocks"):
        for step in calibrator:
            step.finish()
