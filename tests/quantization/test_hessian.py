import pytest
import torch

from epmq.quantization.hessian import Moments, hessian_loss


@pytest.mark.parametrize("columns", [8, 300])
def test_moments_are_means_over_all_batches(columns):
    inputs, drift, targets = torch.randn(40, columns), torch.randn(40, columns), torch.randn(40, 3)
    moments = Moments(columns)
    assert moments.input_drift is None and moments.target_cross is None
    for batch in (slice(0, 25), slice(25, 40)):
        moments.add(inputs[batch], drift=drift[batch], targets=targets[batch])
    assert moments.count == 40
    torch.testing.assert_close(moments.mean, inputs.mean(0))
    torch.testing.assert_close(moments.gram, inputs.T @ inputs / 40)
    torch.testing.assert_close(moments.input_drift, drift.T @ inputs / 40)
    torch.testing.assert_close(moments.target_cross, targets.T @ inputs / 40)


def test_moments_leave_padding_out():
    inputs = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    masked, real = Moments(8), Moments(8)
    masked.add(inputs, mask)
    real.add(inputs[mask])
    assert masked.count == 8
    torch.testing.assert_close(masked.gram, real.gram)
    torch.testing.assert_close(masked.mean, inputs[mask].mean(0))


def test_the_loss_is_the_trace_a_row():
    delta, hessian = torch.randn(5, 8), torch.randn(8, 8)
    torch.testing.assert_close(hessian_loss(delta, hessian), (delta @ hessian @ delta.T).diagonal())
