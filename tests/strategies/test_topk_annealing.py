"""Gradient Annealing on a fixed budget against autograd through a mask with a proxy derivative."""

import pytest
import torch

from lightning_sparse import TopKGradientAnnealing
from lightning_sparse.engine.latent import Context, Latent
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, assert_equal_training
from tests.reference import training as reference

ALL = [(WEIGHTS, 0.7)]


def twin(pools=ALL, *, alpha=0.6, reset=9, epochs=EPOCHS, **settings):
    return lambda thetas: reference.TopKGradientAnnealing(
        thetas, pools, alpha=alpha, reset=reset, epochs=epochs, **settings
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_autograd(host, dtype):
    assert_equal_training(
        TopKGradientAnnealing(0.7, distribution="global", alpha=0.6, alpha_reset=9, verbose=False),
        twin(),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize(("alpha_reset", "epoch"), [(4, 4), (0.75, 9), (0.0, 0), (None, None)])
def test_the_moment_at_which_alpha_becomes_zero(alpha_reset, epoch):
    assert_equal_training(
        TopKGradientAnnealing(0.7, distribution="global", alpha=0.6, alpha_reset=alpha_reset, verbose=False),
        twin(reset=epoch),
    )


@pytest.mark.parametrize("backward_sparsity", [0.3, 0.5, 0.9])
def test_backward_sparsity(backward_sparsity):
    assert_equal_training(
        TopKGradientAnnealing(
            0.7, distribution="global", alpha=0.6, alpha_reset=9, backward_sparsity=backward_sparsity, verbose=False
        ),
        twin(backward_sparsity=backward_sparsity),
    )


def test_the_same_sparsity_in_each_weight_on_a_ramp():
    assert_equal_training(
        TopKGradientAnnealing(0.7, start=1, end=8, distribution="uniform", alpha=0.6, alpha_reset=9, verbose=False),
        twin([([name], 0.7) for name in WEIGHTS], start=1, end=8),
    )


def test_own_budgets_and_masks_of_every_fifth_step():
    assert_equal_training(
        TopKGradientAnnealing(
            0.7,
            distribution="global",
            alpha=0.6,
            alpha_reset=9,
            update_every_n_steps=5,
            overrides={"stem": {"sparsity": 0.3}, "head.weight": None},
            verbose=False,
        ),
        twin([(["depthwise.weight", "grouped.weight"], 0.7), (["stem.weight"], 0.3)], every=5),
    )


@pytest.mark.parametrize(
    ("backward_sparsity", "expected"),
    [(None, [[1.0, 1.0, 1.5], [2.0, 5.0, 3.0]]), (0.5, [[1.0, 1.0, 0.0], [0.0, 5.0, 0.0]])],
)
def test_gradient_by_hand(backward_sparsity, expected):
    # The two largest, 1 and 0.8, are kept. The others hear half of their gradients in epoch 0, where the decay is 1;
    # with a backward sparsity of a half only the next largest, -0.5, does.
    callback = TopKGradientAnnealing(4 / 6, alpha=0.5, backward_sparsity=backward_sparsity)
    theta, now = torch.tensor([[1.0, -0.5, 0.2], [-0.1, 0.8, -0.3]]), Context(0, 0, 10, 1.0)
    latent = Latent("w", "w", torch.empty(2, 3), theta)
    latent.select(callback.select([latent], 4 / 6, now)[0])
    callback.project(latent, now, out := torch.empty(2, 3))
    assert torch.equal(out, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.0]]))
    grad = callback.pull_back(latent, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), now)
    assert torch.equal(grad, torch.tensor(expected))
