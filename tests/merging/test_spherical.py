"""Merge methods of lengths and angles, against identities and the forms that were published."""

import math

import pytest
import torch

from epmq.merging import entrywise, spherical
from epmq.merging.entrywise import average
from epmq.merging.spherical import karcher, model_stock, slerp

BASE = torch.zeros(2)


def vectors(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Random tensors with a direction in common."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    return [shared + torch.randn(shape, generator=generator) for _ in range(count)]


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / tensor.norm()


def angle(one: torch.Tensor, two: torch.Tensor) -> float:
    return math.acos(float(unit(one.double()).flatten() @ unit(two.double()).flatten()))


def close(found: torch.Tensor, expected: list[float] | torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def test_slerp_by_hand():
    experts = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    half = math.sqrt(0.5)
    close(slerp(BASE, experts), [3 * half, 4 * half])
    close(slerp(BASE, experts, t=1 / 3), [3 * math.sqrt(0.75), 2.0])
    close(slerp(BASE, experts, t=0.0), experts[0])
    close(slerp(BASE, experts, t=1.0), experts[1])


def test_slerp_goes_along_the_arc_at_one_speed():
    one, two = (unit(vector) for vector in vectors(2, 8, 9))
    for t in (0.0, 0.3, 0.5, 0.9):
        found = slerp(one, [one, two], t=t)
        assert float(found.norm()) == pytest.approx(1, abs=1e-6)
        assert angle(found, two) == pytest.approx((1 - t) * angle(one, two), abs=1e-3)


def test_slerp_connects_what_has_no_angle_by_a_line():
    one = torch.randn(4, 5)
    for two in (one, 3 * one, -0.5 * one, torch.zeros(4, 5), one + 1e-3 * torch.randn(4, 5)):
        close(slerp(one, [one, two], t=0.3), 0.7 * one + 0.3 * two)
    assert torch.equal(slerp(one, [torch.zeros(4, 5)] * 2), torch.zeros(4, 5))


def published_karcher(tensors: list[torch.Tensor], shares: list[float], steps: int) -> torch.Tensor:
    """On the tensors themselves: log maps at a point, their mean, and its exponential map."""
    points = [unit(tensor) for tensor in tensors]
    middle = unit(sum(share * point for share, point in zip(shares, points)))
    for _ in range(steps):
        tangent = torch.zeros_like(middle)
        for share, point in zip(shares, points):
            cosine = (middle * point).sum()
            theta = cosine.acos()
            tangent += share * theta / theta.sin() * (point - cosine * middle)
        size = tangent.norm()
        if size < 1e-7:
            break
        middle = unit(size.cos() * middle + size.sin() * tangent / size)
    return middle * sum(share * tensor.norm() for share, tensor in zip(shares, tensors))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_karcher_is_the_published_form(weights, steps):
    experts = [scale * vector for scale, vector in zip((1.0, 2.0, 0.5), vectors(3, 7, 6))]
    total = weights or [1.0] * 3
    shares = [weight / sum(total) for weight in total]
    expected = published_karcher([expert.double() for expert in experts], shares, steps).float()
    close(karcher(experts[0], experts, weights=weights, steps=steps), expected)


def test_karcher_without_steps_is_multislerp():
    """Its part in the tangent space is 0: the mean of tangents at the mean direction."""
    experts, shares = vectors(3, 7, 6), [0.2, 0.3, 0.5]
    units = [unit(expert) for expert in experts]
    mean = unit(sum(share * point for share, point in zip(shares, units)))
    tangent = sum(share * (point - (point * mean).sum() * mean) for share, point in zip(shares, units))
    size = tangent.norm() + 1e-8
    expected = (mean * size.cos() + tangent * size.sin() / size) * sum(s * e.norm() for s, e in zip(shares, experts))
    close(karcher(experts[0], experts, weights=shares, steps=0), expected)


def test_karcher_of_two_is_slerp():
    experts = [unit(vector) for vector in vectors(2, 5, 8)]
    for t in (0.5, 0.2):
        close(karcher(experts[0], experts, weights=[1 - t, t], steps=100), slerp(experts[0], experts, t=t))


def test_karcher_is_the_minimum_of_squared_angles():
    experts = [vector.double() for vector in vectors(4, 30)]
    found = karcher(experts[0], experts, steps=100)

    def loss(point):
        return sum(angle(point, expert) ** 2 for expert in experts)

    for direction in vectors(5, 30, seed=1):
        assert loss(found + 0.01 * direction) > loss(found) < loss(found - 0.01 * direction)


def test_what_karcher_leaves_alone():
    one, two, three = vectors(3, 4, 6)
    close(karcher(one, [one]), one)
    close(karcher(one, [two, two, two]), two)
    close(karcher(one, [one, two, three], weights=[0.0, 1.0, 0.0]), two)
    zero = torch.zeros(4, 6)
    assert torch.equal(karcher(one, [zero, zero]), zero)
    close(karcher(one, [one, zero]), one / 2)  # the direction of the one, and the mean of the lengths
    assert torch.equal(karcher(one, [zero, two], weights=[1.0, 0.0]), zero)
    opposite = karcher(one, [one, -one])
    assert opposite.isfinite().all() and float(opposite.norm()) == pytest.approx(float(one.norm()), rel=1e-5)


def test_model_stock_by_hand():
    # 60° between them: t = 2 · 0.5 / 1.5.
    base, tau = torch.tensor([1.0, 1.0]), [torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(0.75)])]
    close(model_stock(base, [base + tau[0], base + tau[1]]), base + (tau[0] + tau[1]) / 3)
    close(model_stock(base, [base + tau[0]] * 3), base + tau[0])
    for other in (-tau[0], torch.tensor([0.0, 2.0]), BASE):  # nothing in common: the base
        close(model_stock(base, [base + tau[0], base + other]), base)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_the_published_form(count):
    base, *experts = vectors(count + 1, 6, 8)
    offsets = [(expert - base).flatten() for expert in experts]
    pairs = [(a, b) for i, a in enumerate(offsets) for b in offsets[i + 1 :]]
    cosine = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in pairs]).mean()
    assert cosine > 0.2
    t = count * cosine / (1 + (count - 1) * cosine)
    close(model_stock(base, experts), t * sum(experts) / count + (1 - t) * base)


def test_model_stock_is_the_foot_of_the_centre():
    """The centre of experts that are equally far from it and orthogonal to each other around it, as in the paper."""
    base, centre, *around = torch.linalg.qr(torch.randn(9, 5)).Q.T
    experts = [centre + 0.5 * direction for direction in around]
    found, plane = model_stock(base, experts), torch.stack([expert - base for expert in experts])
    close(plane @ (centre - found), torch.zeros(3))


@pytest.mark.parametrize(
    ("method", "count", "message"),
    [
        (slerp, 1, "slerp merges two experts, not 1"),
        (slerp, 3, "slerp merges two experts, not 3"),
        (model_stock, 1, "model_stock merges two experts or more, not 1"),
    ],
)
def test_a_number_of_experts_that_does_not_fit_is_refused(method, count, message):
    with pytest.raises(ValueError, match=f"merge.method: {message}"):
        method(BASE, [BASE + 1] * count)


@pytest.mark.parametrize("method", [slerp, karcher, model_stock])
def test_methods_turn_with_the_vectors_and_do_not_see_their_shape(method):
    base, *experts = (vector.double() for vector in vectors(3, 12))
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    found = method(base, experts)
    close(method(turn @ base, [turn @ expert for expert in experts]), turn @ found)
    shaped = method(base.view(2, 3, 2), [expert.view(2, 3, 2) for expert in experts])
    assert torch.equal(shaped.flatten(), found)


@pytest.mark.parametrize("method", [slerp, karcher, model_stock])
def test_large_tensors_are_read_in_pieces(method, monkeypatch):
    base, *experts = vectors(3, 31, 7)
    whole = method(base, experts)
    for module in (entrywise, spherical):
        monkeypatch.setattr(module, "PIECE", 10)
    close(method(base, experts), whole, 1e-6)


def test_experts_of_16_bits_are_measured_exactly():
    experts = [vector.bfloat16() for vector in vectors(2, 40, 30)]
    for method in (slerp, karcher):
        expected = method(experts[0].float(), [expert.float() for expert in experts])
        assert torch.equal(method(experts[0], experts), expected.bfloat16())
    assert torch.equal(slerp(experts[0], [experts[0]] * 2), average(experts[0], [experts[0]] * 2))
