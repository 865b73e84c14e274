import pytest
import torch
from torch.nn.functional import linear

from epmq.quantization import ridge as ridges
from epmq.quantization.ridge import RidgeFit, fit_ridge


def problem(examples=40, features=6, classes=3):
    rows, weight, bias = torch.randn(examples, features), torch.randn(classes, features), torch.randn(classes)
    scores = linear(rows, torch.randn(classes, features), torch.randn(classes)) + 0.1 * torch.randn(examples, classes)
    return rows, scores, weight, bias


def test_a_map_that_fits_is_left_alone():
    rows, _, weight, bias = problem()
    found = fit_ridge(rows, linear(rows, weight, bias), weight, bias)
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    assert found.ridge == float("inf")


@pytest.mark.parametrize("biased", [True, False])
def test_the_error_is_that_of_leaving_each_example_out(biased, monkeypatch):
    """The closed form against forty fits, each without one example; the ridge pulls towards the map there is."""
    monkeypatch.setattr(ridges, "RIDGES", (0.1,))
    rows, scores, weight, bias = problem()
    bias = bias if biased else None
    found = fit_ridge(rows, scores, weight, bias)
    wide, size = rows.double(), rows.double().square().mean().sqrt()
    if biased:
        wide = torch.cat([wide, size.expand(40, 1)], dim=1)
    left = (scores - linear(rows, weight, bias)).double()
    ridge = 0.1 * 40 * (wide.T @ wide / 40).diagonal().mean() * torch.eye(wide.shape[1])

    def solved(keep):
        return torch.linalg.solve(wide[keep].T @ wide[keep] + ridge, wide[keep].T @ left[keep])

    errors = []
    for i in range(40):
        keep = torch.arange(40) != i
        errors.append((left[i] - wide[i] @ solved(keep)).square().mean())
    assert found.after == pytest.approx(float(torch.stack(errors).mean()), rel=1e-6)
    move = solved(torch.ones(40, dtype=torch.bool)).T.float()
    torch.testing.assert_close(found.weight, weight + move[:, :6])
    if biased:
        torch.testing.assert_close(found.bias, bias + float(size) * move[:, 6])
    else:
        assert found.bias is None


def test_the_best_ridge_is_taken(monkeypatch):
    rows, scores, weight, bias = problem()
    each = []
    for ridge in ridges.RIDGES:
        monkeypatch.setattr(ridges, "RIDGES", (ridge,))
        each.append(fit_ridge(rows, scores, weight, bias).after)
    monkeypatch.undo()
    found = fit_ridge(rows, scores, weight, bias)
    assert found.after == min(each) < found.before


def test_more_features_than_examples_stay_finite():
    rows, scores, weight, bias = problem(examples=4, features=32)
    found = fit_ridge(rows, scores, weight, bias)
    assert isinstance(found, RidgeFit) and torch.isfinite(found.weight).all() and found.after <= found.before
