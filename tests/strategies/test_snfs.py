"""SNFS against a plain loop that drops, shares out and grows by full sorts."""

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_sparse import SNFS
from lightning_sparse.engine.latent import Context
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, Net, assert_equal_training, host, make_data
from tests.reference import sparse_to_sparse as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_the_equations(host, dtype):
    assert_equal_training(
        SNFS(0.6, end=10, update_every_n_steps=8, seed=1, verbose=False),
        lambda thetas: reference.SNFS(thetas, dict.fromkeys(WEIGHTS, 0.6), fraction=0.5, end=10, every=8, seed=1),
        host=host,
        dtype=dtype,
    )


def test_layers_that_fill_up():
    """At so low a sparsity some layers take all they can, and drop no more than they have zeros."""
    callback = SNFS(0.15, end=10, update_every_n_steps=4, verbose=False)
    assert_equal_training(
        callback,
        lambda thetas: reference.SNFS(thetas, dict.fromkeys(WEIGHTS, 0.15), fraction=0.5, end=10, every=4),
    )
    assert any(callback.mask(name).all() for name in WEIGHTS)


def test_layers_exchange_weights_but_for_those_with_a_budget_of_their_own():
    callback = SNFS(0.6, distribution="erk", end=10, update_every_n_steps=10, overrides={"stem": {"sparsity": 0.3}})
    callback.verbose, rows = False, []

    def look(*_):
        rows.append({name: int(callback.mask(name).sum()) for name in WEIGHTS})

    probe = LambdaCallback(on_train_batch_end=look)
    make_trainer(callback, probe, max_epochs=EPOCHS).fit(Net(HOSTS["sgd"]), make_data())
    assert len({sum(row.values()) for row in rows}) == 1
    assert {row["stem.weight"] for row in rows} == {144 - round(0.3 * 144)}
    assert len({row["head.weight"] for row in rows}) > 3


def test_without_momentum_the_gradient_serves():
    class Twin(reference.SNFS):
        def before_step(self, host, *moment):
            super().before_step(host, *moment)
            self.heard = {name: self.thetas[name].grad.abs() for name in self.names}

        def momentum(self, name):
            return self.heard[name]

    assert_equal_training(
        SNFS(0.6, end=10, update_every_n_steps=8, verbose=False),
        lambda thetas: Twin(thetas, dict.fromkeys(WEIGHTS, 0.6), fraction=0.5, end=10, every=8),
        host=host(torch.optim.SGD, 0.05),
    )


def test_gradients_are_dense():
    assert SNFS(0.9).gradient_density(0.1, Context(1, 0, 10, 0.5)) == 1.0
