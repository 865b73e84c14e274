import pytest
import torch
from families import FAMILIES

from epmq.blocks import find_stacks, input_groups, linears
from epmq.walk import Walk


def groups_of(family: str) -> list[list[str]]:
    spec, found = FAMILIES[family], []
    for step in Walk(spec.build(), spec.batches()):
        groups = input_groups(step.block, lambda step=step: step.run(0))
        assert sorted(name for group in groups for name in group.names) == sorted(n for n, _ in linears(step.block))
        found.append([group.names for group in groups])
        step.finish()
    return found


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


def test_a_layer_without_data_is_an_error():
    block = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="idle"):
        input_groups(block, lambda: block["used"](torch.randn(1, 2)))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of repeated blocks"):
        find_stacks(torch.nn.Linear(2, 2))
