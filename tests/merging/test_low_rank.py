"""Merges of LoRA adapters in the span of their factors."""

import pytest
import torch

from epmq.merging.low_rank import merge_factors
from epmq.merging.matrices import iso_c, tsv_m, wudi


def factors(ranks: tuple[int, ...], out: int = 20, width: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = [(torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator)) for r in ranks]
    return [(up.double(), down.double()) for up, down in draw]


@pytest.mark.parametrize("method", [wudi, tsv_m, iso_c])
@pytest.mark.parametrize("ranks", [(3, 3), (2, 2, 2), (4,), (12, 12)])
def test_the_merge_is_that_of_the_products(method, ranks):
    """Singular values that are 0 are not counted in whole matrices either."""
    pairs = factors(ranks)
    torch.testing.assert_close(merge_factors(method, pairs), method([up @ down for up, down in pairs]))


def test_wudi_has_the_ridge_of_the_whole_matrix():
    pairs = factors((2, 3))
    products = [up @ down for up, down in pairs]
    torch.testing.assert_close(merge_factors(wudi, pairs, ridge=2.0), wudi(products, ridge=2.0))


def test_an_adapter_that_leaves_the_layer_alone_has_rank_0():
    (pair,) = factors((3,))
    none = torch.zeros(20, 0).double(), torch.zeros(0, 24).double()
    torch.testing.assert_close(merge_factors(wudi, [pair, none]), pair[0] @ pair[1])
    assert torch.equal(merge_factors(iso_c, [none, none]), torch.zeros(20, 24).double())
