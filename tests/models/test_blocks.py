"""Blocks of a model, and the linear layers in them."""

import pytest
import torch
from conftest import padded_batches, tiny_bert
from families import FAMILIES, gpt2
from torch import nn

from epmq.models.blocks import (
    as_matrix,
    block_linears,
    find_stacks,
    input_groups,
    is_padding_mask,
    is_transposed,
    linears,
)


class Block(nn.Module):
    """Two layers that read one input, and one that reads what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.idle = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor, calls: int = 1) -> torch.Tensor:
        for _ in range(calls):
            x = self.three(self.one(x) + self.two(x))
        return x


def test_layers_that_receive_one_tensor_are_a_group():
    block, x = Block(), torch.randn(2, 4)
    del block.idle
    first, second = input_groups(block, lambda: block(x))
    assert (first.names, first.calls) == (["one", "two"], 1) and (second.names, second.calls) == (["three"], 1)
    assert [group.calls for group in input_groups(block, lambda: block(x, calls=2))] == [2, 2]
    assert all(not module._forward_pre_hooks for module in block.modules())


def test_equal_tensors_are_not_one_tensor():
    block = Block()
    del block.idle
    groups = input_groups(block, lambda: [layer(torch.ones(2, 4)) for layer in (block.one, block.two, block.three)])
    assert [group.names for group in groups] == [["one"], ["two"], ["three"]]


def test_calls_may_differ_from_run_to_run():
    block, x = Block(), torch.randn(2, 4)
    once, twice, idle = (lambda: block(x)), (lambda: block(x, calls=2)), (lambda: block.one(x))
    assert [group.names for group in input_groups(block, once)] == [["one", "two"], ["three"]]
    groups = {group.names[0]: group for group in input_groups(block, once, twice)}
    assert groups["one"].calls is None and groups["one"].rows == ((2,), (2, 2))
    assert [(group.names, group.calls) for group in input_groups(block, once, idle)] == [
        (["one"], 1),
        (["two"], None),
        (["three"], None),
    ]


def test_lists_in_a_list_are_stacks():
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList(nn.Linear(size, size) for _ in range(2)) for size in (4, 64))
    assert [stack.name for stack in find_stacks(model)] == ["stages.0", "stages.1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_block_is_found(family):
    spec = FAMILIES[family]
    model = spec.build()
    assert {stack.name: len(stack.blocks) for stack in find_stacks(model)} == spec.stacks
    names = [name for name, _ in block_linears(model)]
    assert len(set(names)) == len(names)
    for name, layer in block_linears(model):
        assert model.get_submodule(name) is layer
    outside = {name for name, _ in linears(model)} - set(names)
    assert not any(name.startswith(tuple(f"{stack}." for stack in spec.stacks)) for name in outside)


def test_a_model_without_linear_layers_in_a_list_has_no_blocks():
    assert find_stacks(nn.Linear(2, 2)) == []
    assert find_stacks(nn.Sequential(nn.ModuleList([nn.Conv2d(2, 2, 1)]), nn.Linear(2, 2))) == []


def test_a_small_list_is_no_stack():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
    model.scorers = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))
    assert [stack.name for stack in find_stacks(model)] == ["blocks"]


def test_a_transposed_layer_is_turned_and_turned_back():
    layers = {name: layer for name, layer in block_linears(gpt2()) if name.endswith("mlp.c_fc")}
    for layer in layers.values():
        matrix = as_matrix(layer, layer.weight)
        assert is_transposed(layer) and matrix.shape == (layer.weight.shape[1], layer.weight.shape[0])
        assert torch.equal(as_matrix(layer, matrix), layer.weight)
    plain = next(layer for _, layer in block_linears(tiny_bert()))
    assert layers and not is_transposed(plain) and as_matrix(plain, plain.weight) is plain.weight


def test_padding_masks():
    batch = padded_batches(1)[0]
    assert is_padding_mask(batch["attention_mask"]) and is_padding_mask(batch["attention_mask"].bool())
    assert not is_padding_mask(torch.ones(2, 3)) and not is_padding_mask(torch.ones(2, 1, 3, 3).long())
    assert not is_padding_mask(None)
