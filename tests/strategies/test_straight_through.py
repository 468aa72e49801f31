"""The straight-through baseline against autograd through masks that are taken by a full sort."""

import pytest

from lightning_sparse import StraightThroughMagnitude
from lightning_sparse.functional import erdos_renyi
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, hosts_and_dtypes
from tests.helpers.spent import assert_spent
from tests.reference import dense_gradients as reference

EACH = [([name], 0.6) for name in WEIGHTS]


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    """By default a fixed budget per layer, from the start on."""
    assert_equal_training(
        StraightThroughMagnitude(0.6, verbose=False),
        lambda thetas: reference.StraightThrough(thetas, EACH, start=0, end=0),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("distribution", ["global", "erk"])
def test_ramp_and_distribution(distribution):
    shapes = [Net(HOSTS["sgd"]).get_parameter(name).shape for name in WEIGHTS]
    # At full sparsity; on the way there the densest layers of ERK fill up in another order.
    pools = [(WEIGHTS, 0.6)]
    if distribution == "erk":
        pools = [([name], share) for name, share in zip(WEIGHTS, erdos_renyi(shapes, 0.6), strict=True)]
    constant = {"start": 0, "end": 0} if distribution == "erk" else {"start": 1, "end": 8}
    assert_equal_training(
        StraightThroughMagnitude(0.6, **constant, distribution=distribution, update_every_n_steps=4, verbose=False),
        lambda thetas: reference.StraightThrough(thetas, pools, **constant, every=4),
        accumulate=2,
        clip=0.3,
    )


def test_flops():
    assert_spent(StraightThroughMagnitude(0.6, verbose=False), lambda step, density: 1.0)
