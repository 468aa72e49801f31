"""Learning rate and batch size finders: they train on the side, and leave everything as it was."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.models import Classifier, Loader, make_dataset, make_net, make_trainer, snapshot
from tests.helpers.probes import Probe
from tests.helpers.strategies import SETTINGS, parametrize

FINDER = {"num_training_steps": 6, "early_stop_threshold": None}


def make_model():
    return Classifier(make_net(dropout=0.0), schedule=False)  # no random draws


def fit(model, *callbacks):
    trainer = make_trainer(*callbacks)
    trainer.fit(model, Loader(), Loader(seed=1))
    return trainer


@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize("swap", [False, True])
def test_training_after_a_learning_rate_finder_is_as_without(setting, swap):
    plain, alone = make_model(), setting.build()
    fit(plain, alone)
    model, callback = make_model(), setting.build()
    finder = LearningRateFinder(**FINDER, update_attr=False)
    callbacks = [Probe(callback), callback, finder]
    fit(model, *(callbacks[::-1] if swap else callbacks))
    assert len(finder.optimal_lr.results["loss"]) == FINDER["num_training_steps"]
    assert_same(snapshot(model), snapshot(plain))
    assert_same(callback.state_dict(), alone.state_dict())


@pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")
@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize("changed", [False, True])
def test_learning_rate_finder_before_a_second_fit(setting, changed):
    runs = []
    for finders in ([], [LearningRateFinder(**FINDER, update_attr=False)]):
        model, callback = make_model(), setting.build()
        fit(model, callback)
        if changed:
            with torch.no_grad():
                model.net[6].weight.mul_(0.5)
        fit(model, callback, *finders)
        runs.append(snapshot(model))
    assert_same(runs[1], runs[0])


@parametrize("AutoSparse", "GMP")
def test_the_rate_that_was_found_is_used(setting):
    model, callback = make_model(), setting.build()
    trainer = make_trainer(callback, max_epochs=6)
    before = snapshot(model)
    found = Tuner(trainer).lr_find(model, Loader(), Loader(), num_training=20, early_stop_threshold=None)
    assert model.lr == found.suggestion()
    assert_same(snapshot(model), before)
    trainer.fit(model, Loader(), Loader())
    assert_sparse(model, callback)


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return torch.utils.data.DataLoader(make_dataset(), self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(("name", "as_callback"), [("AutoSparse", True), ("GMP", False)])
def test_training_after_a_batch_size_finder_is_as_with_that_size(name, as_callback):
    model, callback, data = make_model(), SETTINGS[name].build(), Data()
    steps = {"steps_per_trial": 2, "max_trials": 2}
    trainer = make_trainer(callback, *([BatchSizeFinder(**steps)] if as_callback else []))
    if not as_callback:
        Tuner(trainer).scale_batch_size(model, datamodule=data, **steps)
    trainer.fit(model, data)
    assert data.batch_size > 2
    plain, alone, same = make_model(), SETTINGS[name].build(), Data()
    same.batch_size = data.batch_size
    make_trainer(alone).fit(plain, same)
    assert_same(snapshot(model), snapshot(plain))
