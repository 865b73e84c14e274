"""The threshold of a trim, which is found without the whole task vector in memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils as peft

from epmq.merging import trim
from epmq.merging.trim import magnitude_threshold

DENSITIES = st.floats(0.0, 1.0)
# Any finite float32, the small ones (and zero) often enough to repeat.
MAGNITUDES = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38]),
    ),
    min_size=1,
    max_size=60,
)


def threshold_of(pieces, density: float) -> float:
    """Of a task vector that starts at zero."""
    return magnitude_threshold(lambda: [(torch.zeros_like(piece), piece) for piece in pieces], density)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 200), density=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_the_trim_is_pefts_where_magnitudes_differ(size, density, seed):
    vector = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).float() + 1
    vector[::2] *= -1
    kept = torch.where(vector.abs() >= threshold_of([vector], density), vector, 0.0)
    assert torch.equal(kept, peft.magnitude_based_pruning(vector, density))


@settings(deadline=None, max_examples=100)
@given(values=MAGNITUDES, density=DENSITIES)
def test_the_threshold_is_the_kth_largest_magnitude(values, density):
    tensor = torch.tensor(values, dtype=torch.float32)
    keep = int(density * len(values))
    ranked = sorted((abs(float(x)) for x in tensor), reverse=True)
    assert threshold_of([tensor], density) == (ranked[keep - 1] if keep else math.inf)


@settings(deadline=None, max_examples=100)
@given(
    values=MAGNITUDES,
    density=DENSITIES,
    cuts=st.lists(st.integers(0, 60), max_size=4),
    stride=st.integers(1, 70),
    slack=st.sampled_from([0.0, 0.1, 5.0]),
)
def test_the_search_over_pieces_is_exact_wherever_it_begins(values, density, cuts, stride, slack):
    """A draw that misleads costs passes, never the result."""
    whole = torch.tensor(values, dtype=torch.float32)
    pieces = whole.tensor_split(sorted(min(cut, len(values)) for cut in cuts))
    expected = threshold_of([whole], density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trim, "STRIDE", stride)
        patch.setattr(trim, "SLACK", slack or 1e-9)
        assert threshold_of(pieces, density) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_takes_one_pass_beside_the_draw(monkeypatch, dtype):
    passes = []
    search = trim._rank_between
    monkeypatch.setattr(trim, "_rank_between", lambda *arguments: passes.append(1) or search(*arguments))
    values = torch.randn(300_000).to(dtype)
    for density in (0.01, 0.2, 0.9):
        threshold = threshold_of([values.reshape(300, 1000)], density)
        ranked = values.float().abs().sort(descending=True).values
        assert threshold == float(ranked[int(density * 300_000) - 1])
    assert len(passes) == 3


def test_the_search_takes_any_shape_and_16_bit_numbers():
    pieces = [torch.randn(3, 4, 5).bfloat16(), torch.randn(7, 2).T, torch.zeros(2, 2), torch.randn(10_000)]
    whole = torch.cat([piece.float().flatten() for piece in pieces])
    threshold = threshold_of(pieces, 0.2)
    assert threshold == threshold_of([whole], 0.2)
    assert int((whole.abs() >= threshold).sum()) == int(0.2 * len(whole))
