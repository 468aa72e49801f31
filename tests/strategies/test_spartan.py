"""Spartan against autograd through its soft mask."""

import math

import pytest
import torch

from lightning_sparse import Spartan
from lightning_sparse.functional import soft_topk, soft_topk_gradient, soft_topk_pull, soft_topk_shift
from tests.helpers.side_by_side import WEIGHTS, assert_equal_training, hosts_and_dtypes
from tests.helpers.spent import assert_spent
from tests.reference import stochastic as reference

EACH = [([name], 0.6) for name in WEIGHTS]
SETTINGS = {"end": 3, "finetune": 9, "initial_sharpness": 2.0, "sharpness": 30.0, "verbose": False}


def twin(pools=((WEIGHTS, 0.6),)):
    return lambda thetas: reference.Spartan(thetas, list(pools), end=3, finetune=9, first=2.0, last=30.0)


@hosts_and_dtypes
def test_training_equals_autograd(host, dtype):
    assert_equal_training(Spartan(0.6, **SETTINGS), twin(), host=host, dtype=dtype)


def test_each_layer_with_its_own_budget():
    assert_equal_training(Spartan(0.6, **SETTINGS, distribution="uniform"), twin(EACH), accumulate=2, clip=0.3)


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 20.0, 1e5])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_the_soft_mask_adds_up_to_the_budget(sharpness, scale):
    thetas = [scale * torch.randn(300, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
    for kept in (1, 31, 150, 304):
        for near in (0.0, 7.0 * scale):
            shift = soft_topk_shift(thetas, kept, sharpness, near=near)
            masks = torch.cat([soft_topk(theta, shift, sharpness) for theta in thetas])
            assert float(masks.sum()) == pytest.approx(kept, rel=1e-9)


def test_the_soft_mask_is_where_sinkhorn_iterations_converge_to():
    values, beta, k = torch.rand(200, dtype=torch.float64), 8.0, 20.0
    mu = torch.zeros((), dtype=torch.float64)
    for _ in range(5000):  # rows and columns of the transport plan in turn, in the log domain
        nu = -torch.log1p(torch.exp(beta * values + mu))
        mu = math.log(k) - torch.logsumexp(beta * values + nu, 0)
    expected = torch.exp(beta * values + mu - torch.log1p(torch.exp(beta * values + mu)))
    torch.testing.assert_close(soft_topk(values, soft_topk_shift([values], k, beta), beta), expected)


def test_the_soft_mask_maximises_value_and_entropy():
    values, beta, k = torch.rand(50, dtype=torch.float64), 5.0, 10.0

    def objective(mask):
        entropy = -(mask * mask.log() + (1 - mask) * (1 - mask).log()).sum()
        return float((mask * values).sum() + entropy / beta)

    best = soft_topk(values, soft_topk_shift([values], k, beta), beta)
    for _ in range(200):
        step = 1e-3 * torch.randn(50, dtype=torch.float64)
        other = best + step - step.mean()  # of the same sum
        if ((other > 0) & (other < 1)).all():
            assert objective(other) < objective(best)


def test_the_gradient_is_that_of_finite_differences():
    theta, grad = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    parts, beta, k = [15, 25], 6.0, 12.0

    def loss(x):
        return float((grad * x * soft_topk(x, soft_topk_shift([x], k, beta), beta)).sum())

    thetas, grads = theta.split(parts), grad.split(parts)
    masks = soft_topk(theta, soft_topk_shift(thetas, k, beta), beta).split(parts)
    pull = soft_topk_pull(grads, thetas, masks)
    found = [soft_topk_gradient(*one, beta, pull) for one in zip(grads, thetas, masks, strict=True)]
    shifts = 1e-6 * torch.eye(40, dtype=torch.float64)
    expected = torch.tensor([(loss(theta + e) - loss(theta - e)) / 2e-6 for e in shifts], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-6, atol=1e-7)


def test_a_mask_that_cannot_move_pulls_at_nothing():
    ones = [torch.ones(3)]
    assert soft_topk_pull(ones, ones, ones) == 0.0
    assert soft_topk_pull([None], ones, [torch.full((3,), 0.5)]) == 0.0


def test_flops():
    assert_spent(Spartan(0.6, end=2, finetune=7, verbose=False), lambda step, density: 1.0 if step < 42 else density)


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Expected argument `sharpness` to be a finite number > 0, but got 0"):
        Spartan(sharpness=0)
    with pytest.raises(ValueError, match="`initial_sharpness` to be a finite number > 0, but got -1"):
        Spartan(initial_sharpness=-1)
    with pytest.raises(ValueError, match="Expected argument `finetune` to be an int >= 0"):
        Spartan(finetune=1.5)
    with pytest.raises(ValueError, match=r"`finetune` to be no earlier than `end` = 0\.9, but got 0\.8"):
        Spartan(end=0.9)
