"""Law 6: a second fit, copies and pickles of the callback work, and memory does not grow."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from tests.helpers.assertions import assert_same, assert_sparse, describe, pruned
from tests.helpers.models import Classifier, Gan, Loader, fit, make_net, run, snapshot
from tests.helpers.strategies import SETTINGS, every_strategy, some_strategies


class Start(Callback):
    """Remembers the latents that training starts from."""

    def __init__(self, sparse):
        self.sparse, self.latents = sparse, None

    def on_train_epoch_start(self, trainer, pl_module):
        if self.latents is None:
            self.latents = latents_of(self.sparse)


def latents_of(callback):
    return {name: callback.latent(name).clone() for name in callback.targets}


def check_sparsity(setting, callback, model):
    assert_sparse(model, callback)
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.01)


@pytest.mark.parametrize("same_trainer", [True, False])
@every_strategy
def test_second_fit_goes_on_from_the_latents(setting, same_trainer):
    model, callback = Classifier(), setting.build()
    trainer = fit(model, callback)
    end, before = latents_of(callback), describe(model.net)
    start = Start(callback)
    if same_trainer:
        trainer.callbacks.append(start)
        trainer.fit_loop.max_epochs = 6
        run(trainer, model)
    else:
        fit(model, callback, start)
    assert_same(start.latents, end)
    assert not all(latent.equal(end[name]) for name, latent in latents_of(callback).items())
    assert describe(model.net) == before
    check_sparsity(setting, callback, model)


@pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")
@some_strategies
@pytest.mark.parametrize("factor", [0.5, 1 + 1e-6])
def test_second_fit_starts_from_the_weights_if_the_user_has_changed_them(setting, factor):
    model, callback = Classifier(), setting.build()
    fit(model, callback)
    with torch.no_grad():
        model.net[0].weight.mul_(factor)
    changed, start = snapshot(model), Start(callback)
    fit(model, callback, start)
    assert_same(start.latents["net.0.weight"], changed["net.0.weight"])
    check_sparsity(setting, callback, model)


@some_strategies
def test_second_fit_of_another_model_starts_from_its_weights(setting):
    callback = setting.build()
    fit(Classifier(), callback)
    fit(Gan(), callback)
    other, fresh = Classifier(make_net(norm=False)), Classifier(make_net(norm=False))
    fresh.load_state_dict(other.state_dict())
    fit(other, callback)
    fit(fresh, setting.build())
    assert_same(snapshot(other), snapshot(fresh))


@pytest.mark.parametrize("make_model", [Classifier, Gan])
def test_every_fit_has_its_own_account_of_flops(make_model):
    callback, fresh = SETTINGS["GMP"].build(), SETTINGS["GMP"].build()
    fit(Classifier(), callback)
    fit(make_model(), callback, max_epochs=5)
    fit(make_model(), fresh, max_epochs=5)
    assert callback.metrics() == fresh.metrics()
    assert fresh.metrics()["flops/training_total"] > 0
    assert callback.report().to_dict() == fresh.report().to_dict()


@some_strategies
@pytest.mark.parametrize("precisions", [("32-true", "bf16-true"), ("bf16-true", "64-true")])
def test_second_fit_in_another_precision(setting, precisions):
    model, callback = Classifier(), setting.build()
    for precision in precisions:
        fit(model, callback, precision=precision)
        check_sparsity(setting, callback, model)
        assert {callback.latent(name).dtype for name in callback.targets} == {model.net[0].weight.dtype}


@some_strategies
def test_a_test_between_two_fits_changes_nothing(setting):
    models, callbacks = [Classifier(), Classifier()], [setting.build(), setting.build()]
    for model, callback, test in zip(models, callbacks, [True, False], strict=True):
        trainer = fit(model, callback)
        before = snapshot(model)
        if test:
            trainer.validate(model, Loader(), verbose=False)
            trainer.test(model, Loader(), verbose=False)
        assert_same(snapshot(model), before)
        trainer.fit_loop.max_epochs = 5
        run(trainer, model)
    assert_same(snapshot(models[0]), snapshot(models[1]))
    assert_same(callbacks[0].state_dict(), callbacks[1].state_dict())


@some_strategies
def test_a_test_of_a_checkpoint_does_not_leak_into_the_next_fit(setting):
    callback, saver = setting.build(), ModelCheckpoint(".", "end")
    trainer = fit(Classifier(), callback, saver)
    trainer.test(ckpt_path="end.ckpt", dataloaders=Loader(), verbose=False)
    other, fresh = Classifier(), Classifier()
    fit(other, callback)
    fit(fresh, setting.build())
    assert_same(snapshot(other), snapshot(fresh))


@some_strategies
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_the_callback_train_alike(setting, duplicate):
    callback, models = setting.build(), [Classifier() for _ in range(4)]
    twin = duplicate(callback)
    fit(models[0], callback)
    fit(models[1], twin)
    assert_same(snapshot(models[1]), snapshot(models[0]))
    # A copy of a trained callback knows what the original knows, and shares nothing with it.
    trained = duplicate(callback)
    before = copy.deepcopy(callback.state_dict())
    assert_same(trained.state_dict(), before)
    assert trained.report().to_dict()["rows"] == callback.report().to_dict()["rows"]
    fit(models[2], trained)
    assert_same(callback.state_dict(), before)
    assert_same(snapshot(models[2]), snapshot(models[0]))


@some_strategies
def test_copies_of_a_trained_callback_hold_no_model(setting):
    model, callback = Classifier(make_net(norm=False)), setting.build()
    nn.utils.parametrizations.weight_norm(model.net[6])  # cannot be pickled
    fit(model, callback)
    assert pickle.loads(pickle.dumps(callback)).targets == callback.targets
    copied = copy.deepcopy(callback)
    assert not any(getattr(value, "__self__", None) is not None for value in vars(copied).values())


def test_a_model_can_be_copied_and_pickled_after_training():
    model = Classifier()
    fit(model, SETTINGS["ST3"].build())
    assert_same(snapshot(copy.deepcopy(model)), snapshot(model))
    torch.save(model.net, "net.pt")
    assert_same(snapshot(torch.load("net.pt", weights_only=False)), snapshot(model.net))


def count_tensors():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.filterwarnings("ignore:Training ended at sparsity:UserWarning")
@every_strategy
def test_memory_is_constant_over_fits(setting):
    model, callback, counts = Classifier(), setting.build(), []
    gc.freeze()  # what other tests have left
    for _ in range(3):
        trainer = fit(model, callback, max_epochs=1, limit_val_batches=0)
        dead = [weakref.ref(trainer), weakref.ref(trainer.optimizers[0])]
        del trainer
        model.trainer = None
        model.zero_grad()
        counts.append(count_tensors())
        assert [ref() for ref in dead] == [None, None]
    gc.unfreeze()
    assert counts[1] == counts[2]
