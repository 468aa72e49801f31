"""Sparse variational dropout against autograd through noise and divergence, given the same noise."""

import math

import pytest
import torch

from lightning_sparse import SparseVariationalDropout
from lightning_sparse.functional import add_noise, log_alpha, noise_gradient, normal
from tests.helpers.side_by_side import BATCHES, WEIGHTS, assert_equal_training, hosts_and_dtypes
from tests.helpers.spent import assert_spent
from tests.reference import stochastic as reference

SETTINGS = {"kl_weight": 2e-4, "start": 1, "end": 5, "verbose": False}


def twin(*, rate, init=-5.0, **settings):
    return lambda thetas: reference.VariationalDropout(
        thetas, WEIGHTS, kl_weight=2e-4, start=1, end=5, init=init, rate=rate, batches=BATCHES, **settings
    )


@hosts_and_dtypes
def test_training_equals_autograd(host, dtype):
    rate = {"sgd": 0.01, "nesterov": 0.02, "adamw": None}[host]
    callback = SparseVariationalDropout(**SETTINGS, log_variance_init=-5.0, log_variance_lr=rate)
    assert_equal_training(callback, twin(rate=rate), host=host, dtype=dtype)


def test_rates_at_their_bound_and_accumulated_gradients():
    """Many weights lie beyond a narrow bound, where neither noise nor divergence moves the variance."""
    callback = SparseVariationalDropout(**SETTINGS, log_variance_init=-5.0, log_variance_lr=0.05, bound=3.5)
    assert_equal_training(callback, twin(rate=0.05, bound=3.5, accumulate=2), accumulate=2, clip=0.3)


@pytest.mark.parametrize("bound", [2.0, 8.0])
def test_gradients_are_those_of_autograd(bound):
    theta = torch.randn(400, dtype=torch.float64).requires_grad_()
    variance = (4 * torch.randn(400, dtype=torch.float64)).requires_grad_()
    noise, grad = torch.randn(2, 400, dtype=torch.float64)
    rate = torch.clamp(variance - torch.log(theta**2), -bound, bound)
    weight = theta + torch.sqrt(torch.exp(rate) * theta**2) * noise
    torch.testing.assert_close(add_noise(theta, variance, noise, bound), weight)
    torch.testing.assert_close(log_alpha(theta, variance, bound), rate)
    ((weight * grad).sum() + 0.3 * reference.divergence(rate)).backward()
    assert 0.05 < float((rate.abs() == bound).double().mean()) < 0.95
    for mean, expected in ((True, theta.grad), (False, variance.grad)):
        found = noise_gradient(grad, theta.detach(), variance.detach(), noise, bound, 0.3, mean=mean)
        torch.testing.assert_close(found, expected)


def test_weights_of_zero_are_pruned_and_hear_the_loss():
    zero, one = torch.zeros(1), torch.ones(1)
    assert log_alpha(zero, -10 * one) == 8.0
    assert add_noise(zero, -10 * one, one) == 0.0
    assert noise_gradient(one, zero, -10 * one, one, 8.0, 1.0, mean=True) == 1.0
    assert noise_gradient(one, zero, -10 * one, one, 8.0, 1.0, mean=False) == 0.0


def test_normal_numbers_are_normal():
    grid = (torch.arange(1 << 12, dtype=torch.float64) + 0.5) / (1 << 12)
    numbers = normal(grid)
    torch.testing.assert_close(0.5 * (1 + torch.erf(numbers / math.sqrt(2))), grid)
    for dtype in (torch.float32, torch.float64):
        extremes = normal(torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24], dtype=dtype))
        assert extremes.isfinite().all()
        assert (extremes[0] < extremes[1]) & (extremes[1] < extremes[2])


def test_flops():
    callback = SparseVariationalDropout(**SETTINGS, log_variance_init=-2.5)
    assert_spent(callback, lambda step, density: 3.0 - 2.0 * density)  # noisy weights are dense


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Expected argument `kl_weight` to be a finite number >= 0, but got -1"):
        SparseVariationalDropout(kl_weight=-1)
    with pytest.raises(ValueError, match=r"Expected argument `bound` to be more than `threshold` = 3\.0, but got 2"):
        SparseVariationalDropout(bound=2)
