import pytest
import torch
from hessians import hessian_of
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq.quantization.factor import factorize
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import BITS, GROUP_SIZES, Grid
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.rtn import rtn


def textbook_gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, act_order: bool) -> torch.Tensor:
    """Frantar et al., Algorithm 1, column by column with the factor of the inverse, in float64."""
    scale, zero = grid.scales(weight)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(hessian))
    free = weight.double()[:, order].clone()
    inverse = torch.linalg.inv(hessian.double()[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(free)
    width = grid.width(weight.shape[1])
    for i in range(free.shape[1]):
        group = int(order[i]) // width
        step, offset = scale[:, group].double(), zero[:, group].double()
        codes[:, i] = ((free[:, i] / step).round() + offset).clamp(grid.lowest, grid.highest)
        error = (free[:, i] - (codes[:, i] - offset) * step) / factor[i, i]
        free[:, i:] -= error[:, None] * factor[i, i:]
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return unordered.to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_every_grid_and_order_is_the_textbook_algorithm(bits, group_size, symmetric, act_order):
    """Code for code, on one block of columns."""
    grid = Grid(bits, group_size, symmetric)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits))
    hessian = hessian_of(128, bits)
    ours, _ = gptq(weight.double(), hessian.double(), grid, act_order=act_order)
    assert torch.equal(ours.codes, textbook_gptq(weight, hessian, grid, act_order))


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([-1, 32]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    rows=st.integers(1, 20),
    columns=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 1000),
)
def test_gptq_is_the_textbook_algorithm(bits, group_size, symmetric, act_order, rows, columns, seed):
    grid = Grid(bits, group_size, symmetric)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    hessian = hessian_of(columns, seed)
    ours, loss = gptq(weight.double(), hessian.double(), grid, act_order=act_order)
    expected = textbook_gptq(weight, hessian, grid, act_order)
    # A column that lies halfway between two levels may fall either way; then everything after it differs.
    same = (ours.codes == expected).float().mean()
    textbook = ours.__class__(expected, ours.scale, ours.zero_point, grid).dequantize()
    ratio = loss.sum() / hessian_loss(textbook - weight, hessian).sum()
    assert same == 1 or (same > 0.5 and 0.8 < ratio < 1.25)


@settings(deadline=None, max_examples=25)
@given(bits=st.sampled_from(BITS), symmetric=st.booleans(), act_order=st.booleans(), seed=st.integers(0, 1000))
def test_reported_loss_is_the_trace(bits, symmetric, act_order, seed):
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
    hessian = hessian_of(64, seed)
    quantized, loss = gptq(weight, hessian, Grid(bits, 32, symmetric), act_order=act_order)
    delta = (quantized.dequantize() - weight).double()
    trace = torch.trace(delta @ hessian.double() @ delta.T)
    torch.testing.assert_close(loss.sum().double(), trace, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(hessian_loss(delta, hessian).sum().double(), trace, rtol=1e-4, atol=1e-6)


def test_gptq_beats_rounding_under_the_hessian():
    weight, hessian = torch.randn(32, 64), hessian_of(64, 3)
    for bits in BITS:
        grid = Grid(bits, -1, False)
        _, loss = gptq(weight, hessian, grid)
        nearest = hessian_loss(rtn(weight, grid).dequantize() - weight, hessian)
        assert loss.sum() < nearest.sum()


def test_diagonal_hessian_means_rounding():
    weight = torch.randn(16, 64)
    hessian = torch.diag(torch.rand(64) + 0.1)
    for grid in (Grid(4), Grid(3, 32, False), Grid(2, 64)):
        assert torch.equal(gptq(weight, hessian, grid)[0].codes, rtn(weight, grid).codes)


@pytest.mark.parametrize("columns", [128, 200, 320])
@pytest.mark.parametrize("symmetric", [True, False])
def test_several_blocks_of_columns_are_the_textbook_algorithm(columns, symmetric):
    """Blocks that are full and blocks that are not, on float64, where ties do not happen."""
    grid = Grid(4, -1, symmetric)
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    hessian = hessian_of(columns, columns)
    ours, _ = gptq(weight.double(), hessian.double(), grid)
    assert (ours.codes == textbook_gptq(weight, hessian, grid, act_order=True)).float().mean() > 0.999


def test_results_are_ordinary_tensors():
    """They can be changed in place and take part in a graph, though the solver runs without either."""
    quantized, loss = gptq(torch.randn(8, 64), hessian_of(64, 2), Grid(4, 32, False))
    for tensor in (quantized.codes, quantized.scale, quantized.zero_point, loss):
        assert not tensor.is_inference()
        tensor.add_(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_accelerator_gives_what_the_processor_gives(symmetric):
    weight, hessian, grid = torch.randn(64, 320), hessian_of(320, 4), Grid(4, 32, symmetric)
    ours, loss = gptq(weight, hessian, grid)
    theirs, other = gptq(weight.cuda(), hessian.cuda(), grid)
    assert theirs.codes.is_cuda and (theirs.codes.cpu() == ours.codes).float().mean() > 0.9
    torch.testing.assert_close(other.sum().cpu(), loss.sum(), rtol=0.02, atol=0)


def test_rows_are_independent():
    weight, hessian, grid = torch.randn(12, 64), hessian_of(64, 5), Grid(4, 32)
    whole = gptq(weight, hessian, grid)[0]
    for part, rows in zip(whole.split([5, 7]), weight.split([5, 7])):
        assert torch.equal(part.codes, gptq(rows, hessian, grid)[0].codes)


def test_a_factor_that_is_given_changes_nothing():
    weight, hessian, grid = torch.randn(12, 192), hessian_of(192, 5), Grid(4, 32)
    for act_order in (True, False):
        alone, loss = gptq(weight, hessian, grid, act_order=act_order)
        given, other = gptq(weight, factorize(hessian, act_order), grid)
        assert torch.equal(alone.codes, given.codes) and torch.equal(loss, other)


def test_indefinite_hessian_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(torch.randn(4, 32), -torch.eye(32), Grid(4))
