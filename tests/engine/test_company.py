"""Law 7: other callbacks in either order give the same weights, and what they put into the model is sparse too."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

from tests.helpers.assertions import assert_same, count_sparsity
from tests.helpers.models import Classifier, Saver, fit, make_net, snapshot
from tests.helpers.strategies import every_strategy, some_strategies


def make_averaging():
    return {
        "mean": WeightAveraging(),
        "ema": EMAWeightAveraging(decay=0.8),
        "swa": StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1),
    }


def make_watching():
    return {
        "early": EarlyStopping("val_loss", patience=1, min_delta=10.0, check_on_train_epoch_end=False),
        "lr": LearningRateMonitor(logging_interval="step"),
        "best": ModelCheckpoint(".", "best", monitor="val_loss"),
        "sparsest": ModelCheckpoint(".", "sparsest", monitor="sparsity/total", mode="max"),
    }


@some_strategies
@pytest.mark.parametrize("other", make_watching())
def test_watching_callbacks_change_nothing_in_either_order(setting, other):
    runs = []
    for others in ([], [make_watching()[other]], [make_watching()[other]]):
        model, callback = Classifier(), setting.build()
        callbacks = [*others, callback] if len(runs) == 1 else [callback, *others]
        trainer = fit(model, *callbacks, logger=CSVLogger("."), log_every_n_steps=1)
        runs.append((snapshot(model), callback.state_dict()))
    assert_same(runs[2], runs[1])
    if other == "early":
        assert trainer.current_epoch == 2  # of three
    else:
        assert_same(runs[1], runs[0])


class Weights(Callback):
    """Keeps the weights after every step, and at the start of every epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(snapshot(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(snapshot(pl_module))

    def average(self, other, name):
        if other == "ema":
            average = self.steps[0][name]
            for step in self.steps[1:]:
                average = 0.8 * average + 0.2 * step[name]
            return average
        return torch.stack([w[name] for w in (self.steps if other == "mean" else self.epochs[1:3])]).mean(0)


@every_strategy
def test_averaged_model_is_the_masked_average(setting):
    check_average(setting, "ema", norm=True)


@some_strategies
@pytest.mark.parametrize(("other", "norm"), [("mean", False), ("swa", False), ("swa", True)])
def test_averaged_model_is_the_masked_average_of_other_callbacks(setting, other, norm):
    check_average(setting, other, norm)


def check_average(setting, other, norm):
    """The same average in either order of the callbacks, equal to one taken by hand."""
    runs = []
    for swap in (True, False):
        model, weights = Classifier(make_net(norm=norm), schedule=False), Weights()
        callback, others = setting.build(), [make_averaging()[other], weights]
        fit(model, *(others if swap else []), callback, *([] if swap else others), limit_val_batches=0)
        for name in callback.targets:
            expected = weights.average(other, name) * callback.mask(name)
            # SWA makes a last pass for BatchNorm, which Lightning ends with a step on old gradients.
            actual = weights.steps[-2][name] if other == "swa" and norm else model.get_parameter(name).data
            torch.testing.assert_close(actual, expected)
        assert callback.sparsity == count_sparsity(model, callback.targets)
        if setting.sparsity is not None:
            assert callback.sparsity >= setting.sparsity - 0.01
        runs.append((snapshot(model), callback.state_dict()))
    assert_same(runs[0], runs[1])


@some_strategies
@pytest.mark.parametrize("other", ["mean", "ema"])
def test_averages_are_sparse_wherever_they_are_shown(setting, other):
    model, callback, seen = Classifier(), setting.build(), []

    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            for name in callback.targets:
                assert not pl_module.get_parameter(name)[~callback.mask(name)].any()
            assert float(trainer.callback_metrics["sparsity/total"]) == pytest.approx(
                count_sparsity(pl_module, callback.targets)
            )
            seen.append(trainer.global_step)

    class SaveAndLook(Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trainer.save_checkpoint("now.ckpt")
            saved = torch.load("now.ckpt", weights_only=False)["state_dict"]
            for name in callback.targets:
                assert not saved[name][~callback.mask(name)].any()

    fit(model, callback, make_averaging()[other], Look(), SaveAndLook())
    assert seen[-1] == 12


@some_strategies
@pytest.mark.parametrize("other", ["mean", "ema"])
def test_averaging_does_not_change_what_is_averaged(setting, other):
    plain, callback = setting.build(), setting.build()
    fit(Classifier(), plain)
    fit(Classifier(), callback, make_averaging()[other])
    assert_same({n: callback.mask(n) for n in callback.targets}, {n: plain.mask(n) for n in plain.targets})
    if callback.keeps_latent:
        assert_same(callback.state_dict(), plain.state_dict())


@some_strategies
@pytest.mark.parametrize("checkpoint", ["step=3", "epoch=0", "step=10"])
def test_averaging_resumes(setting, checkpoint):
    runs = []
    for path in (None, f"{checkpoint}.ckpt"):
        model, callback = Classifier(), setting.build()
        fit(model, callback, make_averaging()["ema"], Saver(), ckpt_path=path)
        runs.append((snapshot(model), callback.state_dict()))
    assert_same(runs[1], runs[0])
