"""ST-3 against its equations: straight-through gradients by autograd, a full sort for the quantile."""

import math

import pytest
import torch

from lightning_sparse import ST3, ST3Sigma
from lightning_sparse.engine.latent import Context, Latent
from tests.helpers.side_by_side import HOSTS, WEIGHTS, assert_equal_training
from tests.reference import training as reference

ALL = [(WEIGHTS, 0.6)]
both_methods = pytest.mark.parametrize(("method", "sigma"), [(ST3, False), (ST3Sigma, True)])


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_the_equations(method, sigma, host, dtype):
    assert_equal_training(
        method(0.6, start=1, end=8, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=8, sigma=sigma),
        host=host,
        dtype=dtype,
    )


@both_methods
def test_freezing_bakes_the_weights_and_trains_the_kept_ones(method, sigma):
    """From the end of the first batch of epoch 9: theta <- w, the mask stays, autograd goes through it."""
    assert_equal_training(
        method(0.6, start=1, end=6, freeze=9, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=6, sigma=sigma, fix_from=9),
    )


@pytest.mark.parametrize("host", ["nesterov", "adamw"])
def test_freezing_at_the_end_of_the_ramp(host):
    assert_equal_training(
        ST3(0.6, start=0, end=7, freeze=7, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=0, end=7, fix_from=7),
        host=host,
    )


def test_freezing_takes_thresholds_although_none_are_due():
    assert_equal_training(
        ST3(0.6, start=1, end=6, freeze=9, update_every_n_steps=5, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=6, fix_from=9, every=5),
    )


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients(accumulate):
    """Of ten batches in windows of three the last window is shorter."""
    assert_equal_training(
        ST3(0.6, start=1, end=20, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=20),
        epochs=30,
        accumulate=accumulate,
    )


def test_accumulated_gradients_and_freezing_within_a_window():
    assert_equal_training(
        ST3(0.6, start=1, end=20, freeze=25, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=20, fix_from=25),
        epochs=30,
        accumulate=3,
    )


def test_clipping_sees_the_straight_through_gradient():
    assert_equal_training(
        ST3(0.6, start=1, end=8, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=8),
        clip=0.5,
    )


def test_without_rescaling():
    assert_equal_training(
        ST3(0.6, start=1, end=8, rescale=False, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=8, rescale=False),
    )


def test_thresholds_of_every_fifth_step():
    assert_equal_training(
        ST3(0.6, start=1, end=8, update_every_n_steps=5, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=8, every=5),
    )


def test_own_budgets():
    """One weight stays dense, one has a budget of its own, the others share theirs."""
    assert_equal_training(
        ST3(0.6, start=1, end=8, overrides={"stem": {"sparsity": 0.3}, "head.weight": None}, verbose=False),
        lambda thetas: reference.ST3(
            thetas, [(["depthwise.weight", "grouped.weight"], 0.6), (["stem.weight"], 0.3)], start=1, end=8
        ),
    )


def test_fractions_of_training_mean_the_same_moments():
    assert_equal_training(
        ST3(0.6, start=1 / 12, end=2 / 3, verbose=False),
        lambda thetas: reference.ST3(thetas, ALL, start=1, end=8),
    )


# -- the distinguishing equations, by hand -----------------------------------------------------------------------------

NOW = Context(step=0, epoch=0, epochs=1, progress=1.0)


def latent_of(theta):
    return Latent("w", "w", torch.empty_like(theta), theta)


def test_projection_and_gradient_by_hand():
    # |theta| in order is 1 2 3 4 5 6; sparsity 0.5 falls on position 2.5, so tau = 3.5.
    # Row 1 keeps 6 of 11, c = 1.01 / (6/11 + 0.01) = 1.81833; row 2 keeps 9 of 10, c = 1.01 / 0.91 = 1.10989.
    callback, latent = ST3(0.5), latent_of(torch.tensor([[6.0, -2.0, 3.0], [-5.0, 4.0, 1.0]]))
    latent.select(callback.select([latent], 0.5, NOW)[0])
    assert latent.state == {"threshold": torch.tensor(3.5)}
    callback.project(latent, NOW, out := torch.empty(2, 3))
    by_hand = torch.tensor([[2.5 * 1.81833, 0.0, 0.0], [-1.5 * 1.10989, 0.5 * 1.10989, 0.0]])
    torch.testing.assert_close(out, by_hand, atol=1e-5, rtol=0)
    grad = torch.randn(2, 3)
    assert torch.equal(callback.pull_back(latent, grad.clone(), NOW), grad)


def test_sigma_follows_the_sum_of_the_dimensions():
    # Scores |theta| / sigma are 1 2 3 4 times sqrt(2 + 2), and sqrt(1 + 8) eight times: 2 3 3 3 3 3 3 3 3 4 6 8.
    square, row = latent_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), latent_of(torch.ones(1, 8))
    for sparsity, score in [(9 / 11, 4.0), (1.0, 8.0), (9.5 / 11, 5.0)]:
        chosen = ST3Sigma(0.5).select([square, row], sparsity, NOW)
        assert [float(c["threshold"]) for c in chosen] == pytest.approx([score / math.sqrt(4), score / math.sqrt(9)])
