"""Layers that share an input, each on its own grid."""

import pytest
import torch
from hessians import hessian_of

from epmq.quantization.factor import factorize
from epmq.quantization.grid import Grid
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.stacked import Part, solve

HALF = torch.float16
PARTS = [
    Part(3, Grid(4), torch.float32, HALF),
    Part(5, Grid(3, 32, False), torch.float32, HALF),
    Part(2, None, torch.bfloat16),
    Part(4, Grid(4), torch.float32, HALF),
    Part(1, Grid(4), HALF, HALF),
    Part(6, Grid(8, 64), torch.float32, torch.float32),
]


@pytest.mark.parametrize("search", [True, False])
def test_layers_together_are_each_alone(search):
    target, hessian = torch.randn(sum(part.rows for part in PARTS), 64), hessian_of(64, 1)
    factor = factorize(hessian)
    together, start = solve(target, factor, hessian, PARTS, search), 0
    for part, one in zip(PARTS, together, strict=True):
        rows = target[start : start + part.rows]
        (alone,) = solve(rows, factor, hessian, [part], search)
        assert torch.equal(one.weight, alone.weight) and one.weight.dtype == part.dtype
        assert one.loss == pytest.approx(float(hessian_loss(one.weight.float() - rows, hessian).sum()), rel=1e-3)
        assert one.loss == pytest.approx(alone.loss, rel=1e-5) and one.rounded == alone.rounded
        if part.grid is None:
            assert one.codes is None and torch.equal(one.weight, rows.to(part.dtype))
        else:
            assert one.codes.grid == part.grid and one.codes.scale.dtype == part.scale
            assert torch.equal(one.codes.codes, alone.codes.codes)
            assert torch.equal(one.weight, one.codes.dequantize())
        start += part.rows
