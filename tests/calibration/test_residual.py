import pytest
import torch
from families import FAMILIES
from torch import nn

from epmq.calibration.residual import find_residual_adds
from epmq.calibration.sequential import Batch, SequentialCalibrator
from epmq.models.blocks import input_groups

# What is left out writes through a norm of its own, which no factor a channel describes.
WRITERS = {
    "bert": {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"},
    "dinov2": {"attention.o_proj": "norm2", "mlp.fc2": None},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": None},
    "llama": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None},
    "t5": {"layer.0.SelfAttention.o": "layer.1", "layer.1.DenseReluDense.wo": None},
    "gemma3": {},
}


def batches_of(family: str) -> list[Batch]:
    return [Batch("", index, inputs) for index, inputs in enumerate(FAMILIES[family].batches())]


@torch.no_grad()
@pytest.mark.parametrize("family", WRITERS)
def test_writers_to_the_residual_stream(family):
    model = FAMILIES[family].build()
    step = next(iter(SequentialCalibrator(model, batches_of(family))))
    groups = input_groups(step.block, lambda: step.run(0))
    adds = find_residual_adds(
        step.block, [group.names[0] for group in groups if len(group.names) == 1], lambda: step.run(0)
    )
    assert {name: add.point for name, add in adds.items()} == WRITERS[family]


@torch.no_grad()
def test_cross_attention_writes_too():
    adds = {}
    for step in SequentialCalibrator(FAMILIES["t5"].build(), batches_of("t5")):
        adds[step.name] = find_residual_adds(step.block, ["layer.0.SelfAttention.o"], lambda step=step: step.run(0))
        if step.name.startswith("decoder"):
            adds[step.name] |= find_residual_adds(
                step.block, ["layer.1.EncDecAttention.o"], lambda step=step: step.run(0)
            )
        step.finish()
    assert {name: [add.point for add in of_block.values()] for name, of_block in adds.items()} == {
        **{f"encoder.block.{index}": ["layer.1"] for index in range(2)},
        **{f"decoder.block.{index}": ["layer.1", "layer.2"] for index in range(2)},
    }


class Scaled(nn.Module):
    """h + s ∘ (W₂ gelu(W₁ h)), where W₁ and an identity must not be taken for writers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.passed = nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity()
        self.scale = nn.Parameter(torch.tensor([1.0, -0.5, 1e-3, 2.0, 30.0, 0.1]))

    def forward(self, hidden):
        return (hidden + self.passed(self.scale * self.second(nn.functional.gelu(self.first(hidden)))),)


@torch.no_grad()
def test_layer_scales_are_found():
    block, hidden = Scaled(), torch.randn(4, 5, 6)
    adds = find_residual_adds(block, ["first", "second"], lambda: block(hidden))
    assert list(adds) == ["second"] and adds["second"].point is None
    torch.testing.assert_close(adds["second"].scale, block.scale.data, rtol=1e-3, atol=1e-4)
