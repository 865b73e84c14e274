import pytest
import torch
from hessians import hessian_of

from epmq.quantization.factor import factorize
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid


@pytest.mark.parametrize("size", [48, 128, 300])
@pytest.mark.parametrize("act_order", [True, False])
def test_it_rebuilds_the_hessian(size, act_order):
    hessian = hessian_of(size, 7).double()
    factor = factorize(hessian, act_order)
    upper, order = factor.upper.triu(), factor.order
    torch.testing.assert_close(upper.T @ torch.diag(factor.curvature) @ upper, hessian[order][:, order])
    assert torch.allclose(upper.diagonal(), torch.ones(size).double())
    assert sorted(order.tolist()) == list(range(size))
    taken = order.flip(0)
    assert (hessian.diagonal()[taken].diff() <= 0).all() if act_order else torch.equal(taken, torch.arange(size))


def test_a_wide_hessian_is_factored_in_panels(monkeypatch):
    hessian = hessian_of(1100, 7).double()
    plain = factorize(hessian)
    monkeypatch.setattr("epmq.quantization.factor.WIDE", 1000)
    panels = factorize(hessian)
    torch.testing.assert_close(panels.upper.triu(), plain.upper.triu())
    torch.testing.assert_close(panels.curvature, plain.curvature)


@pytest.mark.parametrize("size", [48, 128, 300])
def test_it_solves(size):
    hessian, right = hessian_of(size, 7).double(), torch.randn(7, size).double()
    found = factorize(hessian).solve(right)
    torch.testing.assert_close(found @ hessian, right)
    assert found.is_contiguous()


def test_nothing_is_read_that_was_not_written():
    """What lies below the diagonal is whatever memory held: it must not matter."""
    hessian, right = hessian_of(300, 7).double(), torch.randn(7, 300).double()
    factor = factorize(hessian)
    expected = factor.solve(right)
    codes = gptq(right, factor, Grid(4))[0].codes
    factor.upper[torch.ones_like(hessian).tril(-1).bool()] = torch.nan
    torch.testing.assert_close(factor.solve(right), expected)
    assert torch.equal(gptq(right, factor, Grid(4))[0].codes, codes)


def test_an_indefinite_hessian_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        factorize(-torch.eye(32))
