import pytest
import torch

from epmq.factor import factorize


def hessian_of(columns: int) -> torch.Tensor:
    inputs = torch.randn(4 * columns, columns).double() @ torch.randn(columns, columns).double()
    return inputs.T @ inputs / len(inputs) + 0.1 * columns * torch.eye(columns)


@pytest.mark.parametrize("size", [48, 128, 300])
@pytest.mark.parametrize("act_order", [True, False])
def test_it_rebuilds_the_hessian(size, act_order):
    hessian = hessian_of(size)
    factor = factorize(hessian, act_order)
    upper, order = factor.upper.triu(), factor.order
    torch.testing.assert_close(upper.T @ torch.diag(factor.curvature) @ upper, hessian[order][:, order])
    assert torch.allclose(upper.diagonal(), torch.ones(size).double())
    assert sorted(order.tolist()) == list(range(size))
    taken = order.flip(0)
    assert (hessian.diagonal()[taken].diff() <= 0).all() if act_order else torch.equal(taken, torch.arange(size))


@pytest.mark.parametrize("size", [48, 128, 300])
def test_it_solves(size):
    hessian, right = hessian_of(size), torch.randn(7, size).double()
    found = factorize(hessian).solve(right)
    torch.testing.assert_close(found @ hessian, right)
    assert found.is_contiguous()


def test_nothing_is_read_that_was_not_written():
    """What lies below the diagonal blocks is whatever memory held: it must not matter."""
    hessian, right = hessian_of(300), torch.randn(7, 300).double()
    factor = factorize(hessian)
    expected = factor.solve(right)
    factor.upper.copy_(factor.upper.triu() + torch.full_like(factor.upper, torch.nan).tril(-1).nan_to_num(1e300))
    for start in range(0, 300, 128):
        factor.upper[start + 128 :, start : start + 128] = torch.nan
    torch.testing.assert_close(factor.solve(right), expected)


def test_an_indefinite_hessian_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        factorize(-torch.eye(32))
