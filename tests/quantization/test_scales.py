import torch
from hessians import hessian_of
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq.quantization.gptq import gptq
from epmq.quantization.grid import BITS, Grid
from epmq.quantization.rtn import round_with
from epmq.quantization.scales import CHUNK, search_scales


@settings(deadline=None, max_examples=20)
@given(
    bits=st.sampled_from(BITS), symmetric=st.booleans(), group_size=st.sampled_from([-1, 32]), seed=st.integers(0, 99)
)
def test_searched_scales_are_never_worse_than_min_max(bits, symmetric, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(6, 64, generator=generator), torch.rand(64, generator=generator)
    grid = Grid(bits, group_size, symmetric)

    def errors(scales):
        delta = round_with(weight, grid, *scales).dequantize() - weight
        return (delta.square() * importance).reshape(6, -1, grid.width(64)).sum(-1)

    searched, plain = search_scales(weight, grid, importance=importance), grid.scales(weight)
    assert (errors(searched) <= errors(plain)).all()
    assert (searched[0] <= plain[0]).all()


def test_searched_scales_help_under_the_hessian():
    weight, hessian = torch.randn(64, 128), hessian_of(128, 11)
    for grid in (Grid(4), Grid(2, 64, False)):
        plain, searched = (gptq(weight, hessian, grid, search=search)[1].sum() for search in (False, True))
        assert searched < plain


def test_rows_are_searched_alike_in_any_number_of_chunks(monkeypatch):
    weight, grid = torch.randn(70, 64), Grid(3, 32, False)
    assert weight.numel() < CHUNK
    whole = search_scales(weight, grid)
    monkeypatch.setattr("epmq.quantization.scales.CHUNK", 1000)
    for one, other in zip(whole, search_scales(weight, grid)):
        assert torch.equal(one, other)
