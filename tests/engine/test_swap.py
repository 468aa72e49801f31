"""Laws 2 and 3: outside the optimizer's step the model holds w, inside it the latents; nothing else ever changes."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparse import (
    AutoSparse,
    Powerpropagation,
    ProbMask,
    SparseVariationalDropout,
    Spartan,
    TopKAST,
    TopKGradientAnnealing,
)
from tests.helpers.assertions import describe
from tests.helpers.models import Classifier, Gan, ManualClassifier, Saver, fit
from tests.helpers.probes import HOOKS, LateProbe, Probe, ProbedSGD
from tests.helpers.strategies import every_strategy, some_strategies

NEVER = {hook for hook in HOOKS if hook.startswith(("on_test", "on_predict"))} | {"on_exception", "on_load_checkpoint"}


def check_hooks(setting, model, *unused):
    """Look into the model in every hook, before and behind our callback, with checkpoints saved in between."""
    callback = setting.build()
    probes = [Probe(callback), LateProbe(callback)]
    fit(model, probes[0], callback, Saver(), probes[1])
    for probe in probes:
        assert set(HOOKS) - probe.seen.keys() == NEVER.union(unused)


@every_strategy
def test_every_hook_of_every_callback_sees_sparse_weights(setting):
    check_hooks(setting, Classifier())


@some_strategies
@pytest.mark.parametrize("make_model", [ManualClassifier, Gan])
def test_every_hook_of_every_callback_sees_sparse_weights_in_manual_optimization(setting, make_model):
    check_hooks(setting, make_model(), "on_before_zero_grad")


class ProbedClassifier(Classifier):
    def configure_optimizers(self):
        return ProbedSGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


class Step(Callback):
    """Compares what the optimizer finds in its step with what the model held just before."""

    def __init__(self, sparse):
        self.sparse, self.steps = sparse, 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = {name: pl_module.get_parameter(name) for name in self.sparse.targets}
        before = {
            name: [
                tensor.detach().clone()
                for tensor in (self.sparse.latent(name), self.sparse.mask(name), parameter, parameter.grad)
            ]
            for name, parameter in parameters.items()
        }
        optimizer.look = lambda: self.compare(parameters, before)

    def compare(self, parameters, before):
        self.steps += 1
        for name, (theta, mask, weight, grad) in before.items():
            assert torch.equal(parameters[name], theta)
            latent_grad = parameters[name].grad
            if isinstance(self.sparse, TopKAST):  # whose gradient is not that of the loss alone
                movable = self.sparse.movable(self.sparse._find(name))
                assert torch.equal(latent_grad != 0, movable)
                continue
            if isinstance(self.sparse, ProbMask) and not self.sparse._weights.frozen:  # w = mask theta
                torch.testing.assert_close(latent_grad * theta, grad * weight)
                continue
            if isinstance(self.sparse, Spartan | SparseVariationalDropout):  # whose gradients are not those of the loss
                continue
            if isinstance(self.sparse, Powerpropagation):
                grad = grad * (self.sparse.power * theta.abs() ** (self.sparse.power - 1.0))
            if self.sparse.replaces_step and self.steps % self.sparse.update_every_n_steps == 0 and self.steps < 9:
                assert latent_grad is None  # before `end`, after 9 of 12 steps
                continue
            assert torch.equal(latent_grad[mask], grad[mask])
            if isinstance(self.sparse, AutoSparse | TopKGradientAnnealing):
                assert (latent_grad.abs() <= grad.abs()).all()
            else:
                frozen = self.sparse._weights.frozen
                assert torch.equal(latent_grad, grad * mask if frozen or self.sparse.gradient == "masked" else grad)


@every_strategy
def test_the_optimizer_sees_latents_and_their_gradients(setting):
    callback = setting.build()
    step = Step(callback)
    fit(ProbedClassifier(), step, callback)
    assert step.steps == 12


def describe_optimizer(optimizer):
    return {key: len(value) for key, value in vars(optimizer).items() if "hooks" in key}, sorted(vars(optimizer))


@every_strategy
def test_modules_parameters_names_and_hooks_stay_as_they_are(setting):
    model, plain, callback = Classifier(), Classifier(), setting.build()
    before, keys = describe(model.net), list(model.state_dict())
    trainer, plain_trainer = fit(model, callback), fit(plain)
    assert describe(model.net) == before
    assert list(model.state_dict()) == keys
    assert vars(model).keys() == vars(plain).keys()
    assert describe_optimizer(trainer.optimizers[0]) == describe_optimizer(plain_trainer.optimizers[0])
    assert trainer.callbacks == [callback]
