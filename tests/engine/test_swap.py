"""Laws 2 and 3: outside the optimizer's step the model holds w, inside it the latents, and nothing else ever changes."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_sparse as ls
from lightning_sparse import SparseTraining
from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.models import Classifier, Gan, ManualClassifier, fit
from tests.helpers.probes import HOOKS, LateProbe, Probe, ProbedSGD
from tests.helpers.strategies import every_strategy, some_strategies

NEVER = {"on_exception", "on_load_checkpoint"} | {
    hook for hook in HOOKS if hook.startswith(("on_test", "on_predict"))
}


class ProbedClassifier(Classifier):
    def configure_optimizers(self):
        return ProbedSGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


class Saver(Callback):
    """Saves a checkpoint in the middle of everything."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint("always.ckpt")


@every_strategy
@pytest.mark.parametrize("make_model", [Classifier, ManualClassifier, Gan])
def test_every_hook_of_every_callback_sees_sparse_weights(setting, make_model):
    callback = setting.build()
    probes = [Probe(callback), LateProbe(callback)]
    fit(make_model(), probes[0], callback, Saver(), probes[1])
    for probe in probes:
        # Zeroing gradients by hand calls no hook.
        silent = {"on_before_zero_grad"} if make_model is not Classifier else set()
        assert set(HOOKS) - set(probe.seen) == NEVER | silent


def expected_gradients(callback, grad, mask):
    """What each method makes of a gradient at w, as bounds: kept weights hear all of it, pruned ones this much."""
    straight = isinstance(callback, ls.ST3) or type(callback) is SparseTraining and callback.gradient != "masked"
    masked = isinstance(callback, ls.GMP) or type(callback) in (ls.STR, SparseTraining)
    share = 1.0 if straight else 0.0 if masked else None
    return mask * grad if share == 0.0 else grad if share == 1.0 else None


@every_strategy
def test_the_optimizer_sees_latents_and_their_gradients(setting):
    callback, steps = setting.build(), []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before = {
                name: (callback.latent(name).clone(), callback.mask(name).clone(), pl_module.get_parameter(name).grad.clone())
                for name in callback.targets
            }
            optimizer.look = lambda: look(pl_module, before)

    def look(model, before):
        for name, (theta, mask, grad) in before.items():
            parameter = model.get_parameter(name)
            assert torch.equal(parameter, theta)
            assert torch.equal(parameter.grad[mask], grad[mask])
            assert (parameter.grad.abs() <= grad.abs()).all()
            expected = expected_gradients(callback, grad, mask)
            if expected is not None and "freeze" not in str(setting):
                assert torch.equal(parameter.grad, expected)
        steps.append(model)

    fit(ProbedClassifier(), Watch(), callback)
    assert len(steps) == 12


@every_strategy
def test_modules_parameters_names_and_hooks_stay_as_they_are(setting):
    model, plain = Classifier(), Classifier()

    def describe(module):
        names = [(name, type(m), sorted(vars(m)), [len(v) for k, v in vars(m).items() if k.endswith("_hooks")]) for name, m in module.named_modules()]
        return names, list(module.state_dict()), [(n, type(p), p.shape, p.stride()) for n, p in module.named_parameters()]

    def describe_optimizer(optimizer):
        return sorted(vars(optimizer)), [len(v) for k, v in vars(optimizer).items() if "hooks" in k]

    before, ids = describe(model.net), [id(p) for p in model.parameters()]
    data = [p.data_ptr() for p in model.parameters()]
    callback = setting.build()
    trainer, plain_trainer = fit(model, callback), fit(plain)
    assert describe(model.net) == before
    assert describe(model)[0][0] == describe(plain)[0][0]
    assert [id(p) for p in model.parameters()] == ids
    assert [p.data_ptr() for p in model.parameters()] == data
    assert [describe_optimizer(o) for o in trainer.optimizers] == [describe_optimizer(o) for o in plain_trainer.optimizers]
    assert trainer.callbacks == [callback]
