"""DSR against a plain loop that drops, shares out and grows one weight at a time."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparse import DSR
from tests.helpers.models import Gan, Loader, make_trainer
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, Net, assert_equal_training, hosts_and_dtypes, make_data
from tests.helpers.spent import assert_spent
from tests.reference import rewiring as reference

EACH = dict.fromkeys(WEIGHTS, 0.6)


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    twins = []

    def make(thetas):
        twins.append(reference.DSR(thetas, EACH, end=11, every=8, fraction=0.1, threshold=0.04, seed=1))
        return twins[0]

    callback = DSR(0.6, drop_threshold=0.04, end=11, update_every_n_steps=8, seed=1, verbose=False)
    assert_equal_training(callback, make, host=host, dtype=dtype)
    steps, thresholds, dropped = zip(*twins[0].events, strict=True)
    assert steps == tuple(range(8, 110, 8))
    assert len(set(thresholds)) > 1
    assert min(dropped) > 0
    for name in WEIGHTS:
        assert float(callback._find(name).state["drop_threshold"]) == pytest.approx(twins[0].threshold_now, rel=1e-6)


def test_layers_that_fill_up_and_layers_that_keep_but_one():
    """H starts far above all weights: each layer keeps one, then grows by an equal share as far as that fits."""
    budgets = dict.fromkeys(WEIGHTS, 0.15)

    def make(thetas):
        twin = reference.DSR(thetas, budgets, start=2, end=9, every=7, fraction=0.5, threshold=1000.0)
        twin.reset = True
        return twin

    settings = {"drop_fraction": 0.5, "drop_threshold": 1000.0, "start": 2, "end": 9, "update_every_n_steps": 7}
    callback = DSR(0.15, **settings, reset_optimizer_state=True, verbose=False)
    assert_equal_training(callback, make)
    assert {name for name in WEIGHTS if not callback.mask(name).all()} == {"head.weight"}
    assert callback._find("head.weight").state["drop_threshold"] == 1000 / 2**10


class Watch(Callback):
    """Copies masks, weights and momenta after each step."""

    def __init__(self, sparse):
        self.sparse, self.rows = sparse, []

    def on_train_batch_end(self, trainer, model, *args):
        names = self.sparse.targets
        (optimizer,) = trainer.optimizers
        self.rows.append(
            {
                name: (
                    self.sparse.mask(name).clone(),
                    model.get_parameter(name).detach().clone(),
                    optimizer.state[model.get_parameter(name)]["momentum_buffer"].clone(),
                )
                for name in names
            }
        )


def test_an_update_moves_the_masks_then_and_by_as_much_as_it_should():
    callback = DSR(0.6, drop_threshold=0.04, start=2, end=9, update_every_n_steps=15, verbose=False)
    callback.patterns["overrides"] = {"stem": {"sparsity": 0.3}}
    watch, moved = Watch(callback), []
    make_trainer(callback, watch, max_epochs=EPOCHS).fit(Net(HOSTS["sgd"]), make_data())
    for step, (before, after) in enumerate(itertools.pairwise(watch.rows), 2):
        masks = [(before[name][0], after[name][0]) for name in WEIGHTS]
        assert sum(int(new.sum()) for _, new in masks) == sum(int(old.sum()) for old, _ in masks)
        assert after["stem.weight"][0].sum() == 144 - round(0.3 * 144)
        if any(not torch.equal(old, new) for old, new in masks):
            moved.append(step)
        for name in WEIGHTS:
            grown = after[name][0] & ~before[name][0]
            assert not after[name][1][grown].any()
            assert torch.isfinite(after[name][2]).all()
    assert moved == [30, 45, 60, 75]  # at step 90 the window is over
    assert len({int(row["head.weight"][0].sum()) for row in watch.rows}) > 1


def test_with_several_optimizers_each_exchanges_weights_among_those_it_steps():
    callback, counts = DSR(0.5, update_every_n_steps=2, drop_threshold=0.05, end=1.0, verbose=False), []

    class Count(Callback):
        def on_train_batch_end(self, *args):
            counts.append({name: int(callback.mask(name).sum()) for name in callback.targets})

    make_trainer(callback, Count(), max_epochs=6).fit(Gan(), Loader(batches=8), Loader())
    for part in ("generator", "critic"):
        totals = {sum(n for name, n in row.items() if name.startswith(part)) for row in counts}
        assert len(totals) == 1
        assert len({row[f"{part}.0.weight"] for row in counts}) > 2


def test_gradients_are_those_of_the_kept_weights():
    assert_spent(DSR(0.9, update_every_n_steps=5, verbose=False), lambda step, density: density)
