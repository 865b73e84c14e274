"""Hooks that stay for the length of a `with` block."""

import pytest
import torch
from families import FAMILIES
from torch import nn

from epmq.models.hooks import first_tensor, watch, without_cache


class Block(nn.Module):
    """Gives its hidden states and something else; its layer takes them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.layer(input=x + 1), None


def test_what_is_watched_is_the_input_of_a_module_or_the_output_of_the_block():
    block, inputs, outputs = Block(), [], []
    x = torch.randn(2, 3)
    with watch(block, "layer", inputs.append), watch(block, None, outputs.append):
        output, _ = block(x)
    block(x)
    assert torch.equal(inputs[0], x + 1)
    assert len(inputs) == len(outputs) == 1 and outputs[0] is output


def test_the_hidden_states_are_the_output_or_its_first_part():
    x = torch.ones(1)
    assert first_tensor(x) is x and first_tensor((x, None)) is x


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_caches_are_off_for_the_length_of_a_block(family):
    model = FAMILIES[family].build()
    with pytest.raises(RuntimeError), without_cache(model):
        assert not model.config.use_cache
        raise RuntimeError
    assert model.config.use_cache
    model.config.use_cache = False
    with without_cache(model):
        pass
    assert not model.config.use_cache
