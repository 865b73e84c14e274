from types import SimpleNamespace

import torch
from torch import nn

from epmq.calibration.collect import InputCollector
from epmq.calibration.grouping import LayerTarget
from epmq.calibration.residual import ResidualAdd
from epmq.quantization.hessian import Moments


class Block(nn.Module):
    """z = h + 2 (W x), read by a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(5, 5), nn.RMSNorm(5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.norm(h + 2 * self.inner(torch.tanh(h)))


@torch.no_grad()
def test_errors_in_the_stream_count_by_their_share_of_the_experts_token():
    torch.manual_seed(0)
    block, rows, theirs = Block(), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    theirs[:, 0] *= 1e3  # such as a decoder's first token
    theirs[1, 3] = 0
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = False
    step = SimpleNamespace(
        run_until=lambda position, layer: torch.tanh(rows),
        kept_input=lambda position, point: rows,
        padding_mask=lambda inputs: mask,
    )
    group = SimpleNamespace(
        names=("inner",),
        features=0.0,
        modules=[block.inner],
        target=LayerTarget(["inner"], add=ResidualAdd("norm", torch.full((5,), 2.0), "x")),
        dtype=torch.float32,
    )
    moments, teacher = Moments(5), SimpleNamespace(take=lambda index, point: [theirs])
    InputCollector(step, group, moments, teacher).add_batch(0, 0)

    inputs = torch.tanh(rows)
    size = theirs.square().mean(-1).sqrt()
    weights = (1 / size.clamp(min=0.01 * float(size.median())) ** 2)[mask]
    x, targets = inputs[mask].double(), ((theirs - rows) / 2 - block.inner.bias)[mask].double()
    assert moments.count == 7
    torch.testing.assert_close(moments.gram.double(), (x.T * weights) @ x / 7, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.target_cross.double(), (targets.T * weights) @ x / 7, rtol=1e-4, atol=0)
