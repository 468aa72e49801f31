"""Powerpropagation against autograd through the power."""

import pytest
import torch

from lightning_sparse import Powerpropagation
from lightning_sparse.functional import power_gradient, signed_power
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import (
    STANDING_STILL,
    WEIGHTS,
    Net,
    assert_equal_training,
    hosts_and_dtypes,
    make_data,
)
from tests.helpers.spent import assert_spent
from tests.reference import dense_gradients as reference

EACH = [([name], 0.6) for name in WEIGHTS]


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    assert_equal_training(
        Powerpropagation(0.6, power=2.0, start=1, end=8, update_every_n_steps=30, verbose=False),
        lambda thetas: reference.Powerpropagation(thetas, [(WEIGHTS, 0.6)], power=2.0, start=1, end=8, every=30),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("power", [1.0, 1.25, 3.0])
def test_powers(power):
    assert_equal_training(
        Powerpropagation(
            0.6, power=power, start=1, end=8, distribution="uniform", update_every_n_steps=10, verbose=False
        ),
        lambda thetas: reference.Powerpropagation(thetas, EACH, power=power, start=1, end=8, every=10),
        accumulate=2,
        clip=0.3,
    )


@pytest.mark.parametrize("power", [1.5, 4.0])
def test_the_network_starts_from_the_weights_that_it_has(power):
    net = Net(STANDING_STILL)
    before = {name: net.get_parameter(name).detach().clone() for name in WEIGHTS}
    make_trainer(Powerpropagation(0.0, power=power, verbose=False), max_epochs=1).fit(net, make_data())
    for name in WEIGHTS:
        torch.testing.assert_close(net.get_parameter(name).detach(), before[name], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_power_and_its_gradient(power):
    theta = torch.randn(50, dtype=torch.float64).requires_grad_()
    grad = torch.randn(50, dtype=torch.float64)
    (theta.sign() * theta.abs() ** power).backward(grad)
    torch.testing.assert_close(power_gradient(grad, theta.detach(), power), theta.grad)
    there = signed_power(theta.detach(), power)
    torch.testing.assert_close(signed_power(there, 1 / power), theta.detach())
    assert torch.equal(signed_power(there.clone(), 1.0), there)
    special = torch.tensor([0.0, -0.0])
    assert signed_power(special, 1 / power).tolist() == [0.0, 0.0]
    assert power_gradient(torch.ones(2), special, power).tolist() == [float(power == 1.0)] * 2


@pytest.mark.parametrize("power", [0.5, -1.0])
def test_powers_below_one_are_refused(power):
    with pytest.raises(ValueError, match=r"Expected argument `power` to be a number >= 1, but got"):
        Powerpropagation(power=power)


def test_flops():
    assert_spent(
        Powerpropagation(0.6, start=0, end=5, update_every_n_steps=3, verbose=False), lambda step, density: density
    )
