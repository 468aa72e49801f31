"""Static masks, SET and RigL against plain loops that drop and grow by full sorts."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparse import SET, RigL, StaticSparsity
from lightning_sparse.engine.latent import Context
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import (
    EPOCHS,
    HOSTS,
    WEIGHTS,
    Net,
    assert_equal_training,
    host,
    hosts_and_dtypes,
    make_data,
)
from tests.reference import sparse_to_sparse as reference

SHAPES = {name: parameter.shape for name, parameter in Net(None).named_parameters() if name in WEIGHTS}
EACH = dict.fromkeys(WEIGHTS, 0.6)


def split(kernel):
    return dict(zip(WEIGHTS, reference.erdos_renyi(list(SHAPES.values()), 0.6, kernel), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_rigl(host, dtype):
    """Updates take the place of steps 30 and 60; the window ends after step 80."""
    assert_equal_training(
        RigL(0.6, distribution="uniform", start=1, end=8, update_every_n_steps=30, verbose=False),
        lambda thetas: reference.RigL(thetas, EACH, start=1, end=8, every=30),
        host=host,
        dtype=dtype,
    )


@hosts_and_dtypes
def test_set(host, dtype):
    assert_equal_training(
        SET(0.6, distribution="uniform", end=8, update_every_n_steps=7, seed=3, verbose=False),
        lambda thetas: reference.SET(thetas, EACH, end=8, every=7, seed=3),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_constant_fraction_and_kept_optimizer_state(method):
    def make(thetas):
        twin = getattr(reference, method)(thetas, EACH, end=8, every=7, fraction=0.5, cosine=False)
        twin.reset = False
        return twin

    cls = {"RigL": RigL, "SET": SET}[method]
    assert_equal_training(
        cls(
            0.6,
            distribution="uniform",
            drop_fraction=0.5,
            drop_schedule="constant",
            end=8,
            update_every_n_steps=7,
            reset_optimizer_state=False,
            verbose=False,
        ),
        make,
        host="adamw",
    )


def test_gradients_are_summed_over_a_step_and_seen_before_clipping():
    assert_equal_training(
        RigL(0.6, distribution="uniform", end=20, update_every_n_steps=7, verbose=False),
        lambda thetas: reference.RigL(thetas, EACH, end=20, every=7),
        epochs=30,
        accumulate=3,
        clip=0.3,
    )


@pytest.mark.parametrize(("distribution", "dtype"), [("er", torch.float64), ("erk", torch.float32)])
def test_static_masks(distribution, dtype):
    assert_equal_training(
        StaticSparsity(0.6, distribution=distribution, seed=5, verbose=False),
        lambda thetas: reference.SET(thetas, split(distribution == "erk"), end=1, every=1000, seed=5),
        dtype=dtype,
    )


def test_own_budgets():
    assert_equal_training(
        RigL(
            0.6,
            distribution="uniform",
            end=8,
            update_every_n_steps=10,
            overrides={"stem": {"sparsity": 0.3}, "head.weight": None},
            verbose=False,
        ),
        lambda thetas: reference.RigL(
            thetas, {"depthwise.weight": 0.6, "grouped.weight": 0.6, "stem.weight": 0.3}, end=8, every=10
        ),
    )


class Watch(Callback):
    """Copies masks, all parameters and the optimizer's state after every step."""

    def __init__(self, sparse):
        self.sparse, self.rows = sparse, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        parameters = dict(pl_module.named_parameters())
        (optimizer,) = trainer.optimizers
        self.rows.append(
            {
                "masks": {name: self.sparse.mask(name).clone() for name in self.sparse.targets},
                "parameters": {name: p.detach().clone() for name, p in parameters.items()},
                "momenta": {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in parameters.items()},
            }
        )


def watch(callback):
    rows = Watch(callback)
    net = Net(host(torch.optim.SGD, 0.02, momentum=0.9, weight_decay=5e-3))
    make_trainer(callback, rows, max_epochs=EPOCHS).fit(net, make_data())
    return rows.rows


@pytest.mark.parametrize("method", [RigL, SET])
def test_an_update_moves_the_masks_then_and_by_as_much_as_it_should(method):
    callback = method(
        0.6, start=2, end=9, drop_fraction=0.3, drop_schedule="constant", update_every_n_steps=15, verbose=False
    )
    rows, dropped = watch(callback), 0
    for step in range(2, len(rows) + 1):
        before, after = rows[step - 2], rows[step - 1]
        for name in WEIGHTS:
            old, new = before["masks"][name], after["masks"][name]
            assert new.sum() == old.sum()
            gone, grown = old & ~new, new & ~old
            assert gone.sum() == grown.sum() <= int(0.3 * old.sum())
            dropped += int(gone.sum())
            assert step in (30, 45, 60, 75, 90) or not gone.any()
            assert not after["parameters"][name][~new | grown].any()
            assert not after["momenta"][name][grown].any()
    assert dropped


def test_rigl_replaces_the_step():
    """No parameter moves, biases and norms included, but for those that are dropped; momentum stays where it was."""
    rows = watch(RigL(0.6, end=9, update_every_n_steps=15, verbose=False))
    for step in range(2, len(rows) + 1):
        before, after = rows[step - 2], rows[step - 1]
        still = all(
            torch.equal(after[kind][name], before[kind][name])
            for kind in ("parameters", "momenta")
            for name in after["parameters"]
            if name not in WEIGHTS
        )
        assert still == (step in (15, 30, 45, 60, 75))
        for name in WEIGHTS if still else ():
            stays = after["masks"][name] & before["masks"][name]
            assert torch.equal(after["parameters"][name], before["parameters"][name] * stays)
            grown = after["masks"][name] & ~before["masks"][name]
            assert torch.equal(after["momenta"][name], before["momenta"][name] * ~grown)


def test_a_second_fit_goes_on_with_the_masks_of_the_first():
    callback, net = SET(0.6, end=1.0, update_every_n_steps=15, verbose=False), Net(HOSTS["sgd"])
    make_trainer(callback, max_epochs=2).fit(net, make_data())
    masks = {name: callback.mask(name).clone() for name in WEIGHTS}
    again = StaticSparsity(0.6, seed=8, verbose=False)
    make_trainer(again, max_epochs=1).fit(net, make_data())
    for name in WEIGHTS:
        assert torch.equal(again.mask(name), masks[name])


def test_dense_gradients_are_paid_for_when_they_are_read():
    rigl, other = RigL(0.9, update_every_n_steps=10), SET(0.9, update_every_n_steps=10)
    for step, progress, needed in [(9, 0.5, 0.1), (10, 0.5, 1.0), (20, 0.0, 0.1), (20, 1.0, 0.1), (30, 0.9, 1.0)]:
        context = Context(step, 0, 10, progress)
        assert rigl.gradient_density(0.1, context) == needed
        assert other.gradient_density(0.1, context) == 0.1
