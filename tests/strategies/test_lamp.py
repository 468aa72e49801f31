"""LAMP against scores that are added up one by one."""

import pytest
import torch

from lightning_sparse import GMP, LAMP
from lightning_sparse.functional import lamp_scores
from tests.helpers.assertions import assert_same
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import (
    HOSTS,
    STANDING_STILL,
    WEIGHTS,
    Net,
    assert_equal_training,
    hosts_and_dtypes,
    make_data,
)
from tests.helpers.spent import assert_spent
from tests.reference import dense_gradients as reference


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    """Masks are taken after steps 30 and 60, and a last time at the end of the ramp, after step 80."""
    assert_equal_training(
        LAMP(0.8, start=1, end=8, update_every_n_steps=30, verbose=False),
        lambda thetas: reference.LAMP(thetas, [(WEIGHTS, 0.8)], start=1, end=8, every=30),
        host=host,
        dtype=dtype,
    )


def test_budgets_of_layers_by_scores_are_those_that_the_scores_have_among_all():
    """Within a layer the scores go by magnitude, so that gradual pruning with these budgets is the same training."""
    ends = []
    for method, split in ((LAMP, {}), (GMP, {"distribution": "lamp"})):
        torch.manual_seed(0)
        net, ramp = Net(HOSTS["sgd"]), {"start": 1, "end": 8, "update_every_n_steps": 10}
        make_trainer(method(0.8, **ramp, **split, verbose=False), max_epochs=10).fit(net, make_data())
        ends.append(net.state_dict())
    assert_same(*ends)
    assert len({round(float((ends[0][name] == 0).double().mean()), 2) for name in WEIGHTS}) > 2


def test_own_budgets():
    assert_equal_training(
        LAMP(0.6, start=1, end=8, update_every_n_steps=10, overrides={"stem": {"sparsity": 0.3}}, verbose=False),
        lambda thetas: reference.LAMP(
            thetas, [(WEIGHTS[1:], 0.6), (WEIGHTS[:1], 0.3)], start=1, end=8, every=10
        ),
    )  # fmt: skip


def test_every_layer_keeps_its_largest_weight():
    """However small it is beside those of the others, which magnitudes alone would keep."""
    net = Net(STANDING_STILL)
    with torch.no_grad():
        net.depthwise.weight.mul_(1e-6)
    largest = {name: net.get_parameter(name).detach().abs().argmax() for name in WEIGHTS}
    size = sum(net.get_parameter(name).numel() for name in WEIGHTS)
    make_trainer(LAMP(1 - 4 / size, start=0, end=1, verbose=False), max_epochs=2).fit(net, make_data())
    for name in WEIGHTS:
        assert net.get_parameter(name).flatten().nonzero().tolist() == [[largest[name]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores(dtype):
    theta = torch.randn(5, 7, 3, dtype=dtype)
    theta[0] = 0.0
    theta = theta if dtype != torch.bfloat16 else theta.abs().unique().view(-1, 1)  # without ties
    torch.testing.assert_close(lamp_scores(theta), reference.lamp(theta), rtol=1e-12, atol=0.0)


def test_scores_of_ties_zeros_and_layouts():
    assert lamp_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp_scores(torch.tensor([-2.0, 2.0, 2.0])).tolist() == [1.0, 1 / 2, 1 / 3]
    theta = torch.randn(4, 3, 2, 2)
    assert torch.equal(lamp_scores(theta.to(memory_format=torch.channels_last)), lamp_scores(theta))


def test_scores_of_many_small_weights_beside_a_large_one_are_exact():
    theta = torch.full((1 << 16,), 1e-5)
    theta[7] = 1.0
    scores = lamp_scores(theta).sort(descending=True).values
    small = float(theta[0].double() ** 2)
    expected = small / (1.0 + small * torch.arange(len(theta), dtype=torch.float64))
    torch.testing.assert_close(scores[1:], expected[1:], rtol=1e-12, atol=0.0)


def test_flops():
    assert_spent(LAMP(0.6, start=0, end=5, update_every_n_steps=3, verbose=False), lambda step, density: density)
