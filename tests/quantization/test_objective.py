import pytest
import torch

from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid
from epmq.quantization.hessian import Moments, hessian_loss
from epmq.quantization.objective import Objective, damping_schedule
from epmq.quantization.rtn import rtn


def moments_of(inputs: torch.Tensor) -> Moments:
    moments = Moments(inputs.shape[-1])
    moments.add(inputs)
    return moments


@pytest.fixture
def layer():
    """Merged weight, two experts and their inputs."""
    merged = torch.randn(12, 32)
    experts = [merged + 0.1 * torch.randn(12, 32) for _ in range(2)]
    inputs = [torch.randn(200, 32) @ torch.randn(32, 32) for _ in range(2)]
    return merged, experts, inputs


def solve(merged, experts, inputs, ridge, weights=(0.5, 0.5)):
    objective = Objective(merged)
    for k, rows in enumerate(inputs):
        objective.add_task(moments_of(rows), weights[k], None if experts is None else experts[k])
    target, used = objective.target(ridge)
    return target, objective.damped(used), used


def test_experts_equal_to_the_merge_give_gptq_exactly(layer):
    merged, _, inputs = layer
    for grid in (Grid(4), Grid(2, 32, False)):
        target, hessian, _ = solve(merged, [merged, merged], inputs, 0.01)
        plain_target, plain_hessian, _ = solve(merged, None, inputs, 0.01)
        assert torch.equal(target, plain_target) and torch.equal(hessian, plain_hessian)
        assert torch.equal(gptq(target, hessian, grid)[0].codes, gptq(plain_target, plain_hessian, grid)[0].codes)


def test_strong_anchor_gives_rounding_of_the_merge(layer):
    merged, experts, inputs = layer
    target, hessian, _ = solve(merged, experts, inputs, 1e7)
    torch.testing.assert_close(target, merged, atol=1e-5, rtol=0)
    assert torch.equal(gptq(target, hessian, Grid(4))[0].codes, rtn(merged, Grid(4)).codes)


def test_no_anchor_gives_regmean(layer):
    merged, experts, inputs = layer
    target, _, _ = solve(merged, experts, inputs, 0.0)
    grams = [rows.double().T @ rows.double() / len(rows) for rows in inputs]
    regmean = sum(w.double() @ g for w, g in zip(experts, grams)) @ torch.linalg.inv(grams[0] + grams[1])
    torch.testing.assert_close(target.double(), regmean, rtol=1e-3, atol=1e-4)


def test_the_pair_has_the_loss_of_the_definition(layer):
    """L(Q) − L(W*) = tr((Q − W*) H (Q − W*)ᵀ) for the loss as it is written with inputs and targets."""
    merged, experts, inputs = layer
    weights = (0.25, 0.75)
    target, hessian, ridge = solve(merged, experts, inputs, 0.05, weights)
    mean = sum(w * (x.square().sum(0) / len(x)) for w, x in zip(weights, inputs)).mean()

    def loss(candidate):
        fits = [
            w / len(x) * ((x @ candidate.T) - (x @ e.T)).double().square().sum()
            for w, x, e in zip(weights, inputs, experts)
        ]
        return sum(fits) + ridge * mean * (candidate - merged).double().square().sum()

    quantized = gptq(target, hessian, Grid(3))[0].dequantize()
    delta = (quantized - target).double()
    trace = torch.trace(delta @ hessian.double() @ delta.T)
    torch.testing.assert_close(loss(quantized) - loss(target), trace, rtol=1e-3, atol=1e-4)


def test_dead_inputs_keep_the_anchor(layer):
    merged, experts, inputs = layer
    for rows in inputs:
        rows[:, [3, 17]] = 0
    target, hessian, _ = solve(merged, experts, inputs, 0.01)
    assert torch.equal(target[:, [3, 17]], merged[:, [3, 17]])
    codes = gptq(target, hessian, Grid(4))[0]
    nearest = rtn(target, Grid(4))
    assert torch.equal(codes.codes[:, [3, 17]], nearest.codes[:, [3, 17]])


def test_rank_deficient_inputs_raise_the_anchor_and_say_so(layer):
    merged, experts, _ = layer
    rows = torch.randn(4, 32).double().float()
    target, _, ridge = solve(merged, experts, [rows, rows], 0.0)
    assert ridge > 0 and torch.isfinite(target).all()


def test_no_data_and_bad_data_are_refused(layer):
    merged, experts, inputs = layer
    with pytest.raises(ValueError, match="no calibration token"):
        Objective(merged).add_task(Moments(32), 1.0)
    inputs[0][0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf"):
        solve(merged, experts, inputs, 0.01)


def test_target_outputs_are_fitted():
    """min Σ ‖X Qᵀ − Y‖²/n + λ̄ ‖Q − A‖², solved directly."""
    inputs, outputs, anchor = torch.randn(50, 6), torch.randn(50, 3), torch.randn(3, 6)
    moments, objective = Moments(6), Objective(anchor)
    moments.add(inputs, targets=outputs)
    objective.add_target_task(moments, 1.0)
    target, hessian = objective.target(0.1)[0], objective.damped(0.1)
    wanted = torch.linalg.solve(hessian, inputs.T @ outputs / 50 + (hessian - inputs.T @ inputs / 50) @ anchor.T).T
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-4)
    assert target.is_contiguous()


@pytest.mark.parametrize("damping", [0.05, 0.3])
def test_the_loss_of_the_anchor_needs_no_hessian(layer, damping):
    merged, experts, inputs = layer
    objective = Objective(merged)
    for expert, rows in zip(experts, inputs):
        moments = Moments(32)
        moments.add(rows, drift=0.1 * torch.randn_like(rows))
        objective.add_task(moments, 0.5, expert, alpha=0.5)
    target, ridge = objective.target(0.05)
    wanted = hessian_loss(merged - target, objective.damped(damping))
    torch.testing.assert_close(objective.anchor_loss(target, ridge, damping), wanted, rtol=1e-3, atol=1e-5)
    assert not Objective(merged).anchor_loss(merged, 0.05, damping).any()


def test_a_factor_is_kept_until_something_is_added(layer):
    merged, experts, inputs = layer
    objective = Objective(merged)
    objective.add_task(moments_of(inputs[0]), 0.5, experts[0])
    first, used = objective.factor(0.1)
    assert objective.factor(0.1)[0] is first and used == 0.1
    assert objective.factor(0.2)[0] is not first
    again = objective.factor(0.1)[0]
    objective.add_task(moments_of(inputs[1]), 0.5, experts[1])
    assert not torch.equal(objective.factor(0.1)[0].curvature, again.curvature)


def test_the_ridge_is_raised_tenfold():
    assert list(damping_schedule(0.5)) == pytest.approx([0.5 * 10**power for power in range(8)])
    assert list(damping_schedule(0.0)) == pytest.approx([0.0, *(10**power for power in range(-6, 1))])
