from dataclasses import replace

import pytest
import torch
from hessians import hessian_of

from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.rtn import round_with, rtn, rtn_fallback
from epmq.quantization.scales import search_scales

GRID = Grid(3, 32, False)


@pytest.fixture
def solution():
    """A target, a Hessian, and what GPTQ makes of them."""
    target, hessian = torch.randn(100, 64), hessian_of(64, 7)
    return target, hessian, *gptq(target, hessian, GRID, search=True)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_it_searches_its_own_scales(scale_dtype):
    target = torch.randn(8, 64)
    searched = rtn(target, GRID, search=True, scale_dtype=scale_dtype)
    expected = round_with(target, GRID, *search_scales(target, GRID, scale_dtype))
    assert torch.equal(searched.codes, expected.codes) and torch.equal(searched.scale, expected.scale)
    assert searched.scale.dtype == scale_dtype
    assert not torch.equal(searched.scale, rtn(target, GRID, scale_dtype=scale_dtype).scale)


def test_a_good_solution_stays(solution):
    target, hessian, solved, loss = solution
    kept, kept_loss, exchanged = rtn_fallback(solved, loss, target, hessian)
    assert kept is solved and kept_loss is loss and not exchanged.any() and exchanged.shape == loss.shape


def test_rows_that_lose_more_than_rounding_are_exchanged(solution):
    target, hessian, solved, _ = solution
    wrong = solved.codes.clone()
    wrong[::2] = solved.grid.lowest
    solved = replace(solved, codes=wrong)
    loss = hessian_loss(solved.dequantize() - target, hessian)
    better, better_loss, exchanged = rtn_fallback(solved, loss, target, hessian)
    nearest = round_with(target, GRID, solved.scale, solved.zero_point)
    assert exchanged[::2].all() and torch.equal(better.codes[exchanged], nearest.codes[exchanged])
    assert torch.equal(better.codes[~exchanged], wrong[~exchanged])
    torch.testing.assert_close(better_loss, hessian_loss(better.dequantize() - target, hessian))
    assert (better_loss <= loss).all()


def test_infinite_losses_and_scales_are_refused(solution):
    target, hessian, solved, loss = solution
    for fields, value in (({}, torch.inf), ({"scale": solved.scale * torch.inf}, 1.0)):
        with pytest.raises(ValueError, match="not finite"):
            rtn_fallback(replace(solved, **fields), loss * value, target, hessian)
