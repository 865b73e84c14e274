"""Merge methods that see matrices, against what they minimise and the forms that were published."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq.merging import matrices
from epmq.merging.matrices import iso_c, iso_cts, nearest_orthogonal, singular_triples, tsv_m, wudi
from epmq.merging.methods import METHODS

FUNCTIONS = {name: method.matrix for name, method in METHODS.items() if method.matrix is not None}
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def vectors(count: int, shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def interference(merged: torch.Tensor, taus: list[torch.Tensor]) -> torch.Tensor:
    """What WUDI minimises."""
    return torch.stack([((merged - tau) @ tau.T).square().sum() / tau.square().sum() for tau in taus]).sum()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_wudi_is_the_minimum_of_its_loss(shape):
    taus = [tau.double() for tau in vectors(3, shape)]
    merged = wudi(taus, ridge=1e-9).requires_grad_()
    loss = interference(merged, taus)
    (slope,) = torch.autograd.grad(loss, merged)
    assert slope.abs().max() < 1e-6 and loss < interference(sum(taus), taus) and loss < interference(taus[0], taus)


def test_wudi_is_regmean_on_task_vectors_with_a_ridge_towards_the_sum():
    taus, total = [tau.double() for tau in vectors(3, (6, 5))], 0
    grams = [tau.T @ tau / tau.square().sum() for tau in taus]
    level = 0.3 * sum(grams).trace() / 5
    total = sum(tau @ gram for tau, gram in zip(taus, grams)) + level * sum(taus)
    expected = total @ torch.linalg.inv(sum(grams) + level * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(wudi(taus, ridge=0.3), expected)


def test_wudi_as_published_descends_to_the_closed_form(monkeypatch):
    taus = vectors(2, (6, 4))
    monkeypatch.setattr(matrices, "STEPS", 4000)
    monkeypatch.setattr(matrices, "STEP_SIZE", 1e-2)
    torch.testing.assert_close(wudi(taus, iterative=True), wudi(taus, ridge=1e-7), rtol=1e-3, atol=1e-3)


def test_wudi_with_hardly_a_ridge_takes_a_larger_one():
    """In float32 the Gram matrix of a wide layer is not positive definite without."""
    taus = vectors(2, (4, 64))
    merged = wudi(taus, ridge=1e-12)
    assert merged.isfinite().all() and interference(merged, taus) < 1e-3 * interference(sum(taus), taus)


def test_wudi_leaves_what_does_not_interfere():
    """Experts whose rows are orthogonal keep all that they learnt, and so does a single one."""
    one, two = torch.zeros(4, 6), torch.zeros(4, 6)
    one[:, :3], two[:, 3:] = vectors(2, (4, 3))
    torch.testing.assert_close(wudi([one, two]), one + two)
    torch.testing.assert_close(wudi([one]), one)
    assert torch.equal(wudi([torch.zeros(4, 6)] * 2), torch.zeros(4, 6))
    torch.testing.assert_close(wudi([one, torch.zeros(4, 6)]), one)


def by_svd_tsv_m(taus: list[torch.Tensor]) -> torch.Tensor:
    """As published: places in matrices of zeros, and SVDs of those."""
    shape, rank = taus[0].shape, min(taus[0].shape) // len(taus)
    left, values, right = torch.zeros(shape[0], min(shape)), torch.zeros(min(shape)), torch.zeros(min(shape), shape[1])
    for i, tau in enumerate(taus):
        u, s, v = torch.linalg.svd(tau, full_matrices=False)
        place = slice(i * rank, (i + 1) * rank)
        left[:, place], values[place], right[place] = u[:, :rank], s[:rank], v[:rank]
    (u_left, _, v_left), (u_right, _, v_right) = (torch.linalg.svd(part, full_matrices=False) for part in (left, right))
    return u_left @ v_left @ torch.diag(values) @ u_right @ v_right


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_tsv_m_is_the_published_form(shape):
    taus = vectors(3, shape)
    torch.testing.assert_close(tsv_m(taus), by_svd_tsv_m(taus), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_iso_c_is_the_published_form(shape):
    taus = vectors(3, shape)
    u, s, v = torch.linalg.svd(sum(taus), full_matrices=False)
    torch.testing.assert_close(iso_c(taus), u @ torch.diag(torch.full_like(s, s.mean())) @ v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
def test_iso_cts_is_the_published_form(shape):
    taus, total = vectors(2, shape), sum(vectors(2, shape))
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    u, s, v = u[:, :8], s[:8], v[:8]  # 0.8 of 10 values; one more a task
    parts = [torch.linalg.svd(tau - u @ u.T @ tau, full_matrices=False) for tau in taus]
    left = torch.cat([*(part[0][:, :1] for part in parts), u], 1)
    values = torch.cat([*(part[1][:1] for part in parts), s])
    right = torch.cat([*(part[2][:1] for part in parts), v])
    left, right = (a @ b for a, _, b in (torch.linalg.svd(m, full_matrices=False) for m in (left, right)))
    torch.testing.assert_close(iso_cts(taus), values.mean() * left @ right, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, count=st.integers(1, 4), seed=st.integers(0, 1000))
def test_singular_triples_and_what_is_orthogonal(shape, count, seed):
    matrix = vectors(1, shape, seed)[0]
    left, values, right = singular_triples(matrix)
    torch.testing.assert_close(left * values @ right.T, matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-4, atol=1e-5)
    near, smaller = nearest_orthogonal(matrix), min(shape)
    gram = near @ near.T if shape[0] <= shape[1] else near.T @ near
    torch.testing.assert_close(gram, torch.eye(smaller), rtol=1e-4, atol=1e-4)
    for name, function in FUNCTIONS.items():
        merged = function([vector.contiguous() for vector in vectors(count, shape, seed)])
        assert merged.shape == shape and merged.isfinite().all(), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_methods_turn_with_the_bases_of_inputs_and_outputs(name):
    taus = [tau.double() for tau in vectors(3, (9, 12))]
    p, q = (torch.linalg.qr(matrix.double()).Q for matrix in (vectors(1, (9, 9))[0], vectors(1, (12, 12))[0]))
    turned = FUNCTIONS[name]([p @ tau @ q.T for tau in taus])
    torch.testing.assert_close(turned, p @ FUNCTIONS[name](taus) @ q.T)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_learnt_stays_nothing(name):
    assert torch.equal(FUNCTIONS[name]([torch.zeros(6, 8)] * 3), torch.zeros(6, 8))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_number_of_threads_makes_no_difference(name):
    taus, before = vectors(3, (300, 200)), torch.get_num_threads()
    try:
        merged = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            merged.append(FUNCTIONS[name](taus))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*merged)
