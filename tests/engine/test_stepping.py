"""Any optimizers, accumulation windows and schedules; counted steps are real steps."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from lightning_sparse import AutoSparse, SparseTraining
from tests.helpers.assertions import assert_same
from tests.helpers.by_hand import Windows, train_by_hand
from tests.helpers.models import BATCH_SIZE, BATCHES, Classifier, Gan, Loader, fit, make_trainer, snapshot
from tests.helpers.probes import LateProbe, Probe
from tests.helpers.side_by_side import EPOCHS, WEIGHTS, assert_equal_training, host
from tests.helpers.strategies import parametrize, some_strategies
from tests.reference import training as reference


class Executions(Callback):
    """Counts how often each optimizer really steps."""

    def on_train_start(self, trainer, pl_module):
        self.counts = dict.fromkeys(range(len(trainer.optimizers)), 0)
        for index, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_post_hook(functools.partial(self.count, index))

    def count(self, index, *_):
        self.counts[index] += 1


def split(parameters):
    """The matrices, which are all that Muon takes, and the others."""
    return [p for p in parameters.values() if p.ndim == 2], [p for p in parameters.values() if p.ndim != 2]


def make_sgd_and_adamw(parameters):
    matrices, others = split(parameters)
    return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]


def make_muon_and_adamw(parameters):
    matrices, others = split(parameters)
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01, fused=True)]


def make_groups(parameters):
    groups = [
        {"params": [parameter], "lr": 0.02 * (1 + i % 3), "weight_decay": 0.05 * (i % 2), "momentum": 0.3 * (i % 4)}
        for i, parameter in enumerate(parameters.values())
    ]
    return [torch.optim.SGD(groups, nesterov=False)]


OPTIMIZERS = {
    "sgd+adamw": make_sgd_and_adamw,
    "muon+adamw": make_muon_and_adamw,
    "groups": make_groups,
    **{
        f"{cls.__name__}-{kernel}": lambda parameters, cls=cls, kernel=kernel: [
            cls(parameters.values(), lr=0.01, weight_decay=0.1, **{kernel: True})
        ]
        for cls, kernel in [
            (torch.optim.SGD, "foreach"),
            (torch.optim.SGD, "fused"),
            (torch.optim.Adam, "foreach"),
            (torch.optim.AdamW, "fused"),
            (torch.optim.RMSprop, "foreach"),
            (torch.optim.Adagrad, "fused"),
            (torch.optim.AdamW, "amsgrad"),
        ]
    },
}


@pytest.mark.parametrize("make_optimizers", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("windows", [pytest.param((1, 2), marks=pytest.mark.slow), (3, 1)], ids=str)
def test_any_optimizers_with_any_windows_equal_a_plain_loop(make_optimizers, windows):
    model, callback = Windows(make_optimizers, windows), SparseTraining(0.6, end=0.0, verbose=False)
    make_trainer(callback).fit(model, Loader(), Loader())
    twin = Windows(make_optimizers, windows)
    for name, (theta, mask) in train_by_hand(twin).items():
        assert torch.equal(callback.mask(f"net.{name}"), mask)
        assert_same(callback.latent(f"net.{name}"), theta, name)


class MasterSGD(torch.optim.Optimizer):
    """Updates a float32 copy of its own, and overwrites the parameter from that."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.float()
                state["master"].sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
                parameter.copy_(state["master"])
        return loss


def make_master(parameters):
    return [MasterSGD(parameters.values(), lr=1e-3)]  # most updates are below the resolution of a bfloat16


def test_an_optimizer_with_a_master_copy_equals_a_plain_loop():
    model, callback = Windows(make_master), SparseTraining(0.6, end=0.0, verbose=False)
    trainer = make_trainer(callback, precision="bf16-true")
    trainer.fit(model, Loader(), Loader())
    for name, (theta, mask) in train_by_hand(Windows(make_master), torch.bfloat16).items():
        assert torch.equal(callback.mask(f"net.{name}"), mask)
        assert_same(callback.latent(f"net.{name}"), theta, name)
        master = trainer.optimizers[0].state[model.net.get_parameter(name)]["master"]
        assert_same(callback.latent(f"net.{name}"), master.bfloat16())


@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize("make_optimizers", [make_master, make_muon_and_adamw])
def test_weights_are_sparse_whatever_an_optimizer_writes_into_them(setting, make_optimizers):
    model, callback = Windows(make_optimizers), setting.build()
    precision = "bf16-true" if make_optimizers is make_master else "32-true"
    fit(model, Probe(callback), callback, LateProbe(callback), precision=precision)
    assert 0.2 < callback.sparsity < 0.9


@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize(
    ("make_model", "windows"),
    [
        (Classifier, [1, 1, 1]),
        (Classifier, [2, 2, 2]),
        (Classifier, [3, 3, 3]),  # of four batches: the last window of an epoch is incomplete
        (Classifier, [1, 4, 3]),
        (functools.partial(Windows, make_sgd_and_adamw, (2, 3)), [1, 1, 1]),
        (Gan, [1, 1, 1]),
    ],
)
def test_counted_steps_are_real_steps(setting, make_model, windows):
    model, callback, executions = make_model(), setting.build(), Executions()
    schedule = [] if set(windows) == {1} else [GradientAccumulationScheduler(dict(enumerate(windows)))]
    trainer = fit(model, callback, executions, *schedule)
    assert callback.state_dict()["steps"] == executions.counts
    assert trainer.global_step == sum(executions.counts.values())
    if make_model is Classifier:
        assert trainer.global_step == sum(-(-BATCHES // window) for window in windows)


class TogglingGan(Gan):
    """Gives closures to the optimizers and freezes the other network meanwhile, or, as the twin has it, neither."""

    def __init__(self, twin=False):
        super().__init__()
        self.twin = twin

    def training_step(self, batch, batch_idx):
        images, noise = batch[0].flatten(1), torch.randn(BATCH_SIZE, 4)
        generator, critic = self.optimizers()
        self.minimize(critic, lambda: (self.critic(self.generator(noise).detach()) - self.critic(images)).mean())
        self.minimize(generator, lambda: -self.critic(self.generator(noise)).mean())

    def minimize(self, optimizer, compute_loss):
        def closure():
            optimizer.zero_grad()
            self.manual_backward(compute_loss())

        if self.twin:
            closure()
            optimizer.step()
        else:
            with optimizer.toggle_model():
                optimizer.step(closure)


def train(model, callback):
    trainer = fit(model, callback)
    return snapshot(model), callback.state_dict(), trainer.global_step


@some_strategies
def test_closures_and_toggled_optimizers_change_nothing(setting):
    assert_same(train(TogglingGan(), setting.build()), train(TogglingGan(twin=True), setting.build()))


class Maximizing(Classifier):
    """Maximizes minus the loss, or minimizes the loss."""

    def __init__(self, make_optimizer, maximize):
        super().__init__(schedule=False)
        self.make_optimizer, self.maximize = functools.partial(make_optimizer, maximize=maximize), maximize

    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch)
        return -loss if self.maximize else loss


@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_learned_thresholds_climb_with_an_optimizer_that_maximizes(setting, optimizer):
    assert_same(*(train(Maximizing(optimizer, maximize), setting.build()) for maximize in (True, False)))


# -- schedules --------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "warm-restarts": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=10 * EPOCHS),
}


@pytest.mark.parametrize(
    ("schedule", "interval", "optimizer"),
    [
        ("warm-restarts", "step", functools.partial(torch.optim.SGD, momentum=0.9)),
        ("warm-restarts", "epoch", torch.optim.AdamW),
        # Changes the momentum with the rate, and that of the thresholds follows.
        ("one-cycle", "step", functools.partial(torch.optim.SGD, momentum=0.9)),
        ("one-cycle", "step", torch.optim.AdamW),
    ],
)
def test_thresholds_follow_any_schedule_of_the_rate(schedule, interval, optimizer):
    settings = {"init": -2.5, "weight_decay": 3e-3, "alpha": 0.6, "reset": 9, "epochs": EPOCHS}
    assert_equal_training(
        AutoSparse(threshold_init=-2.5, threshold_weight_decay=3e-3, alpha=0.6, alpha_reset=9, verbose=False),
        lambda thetas: reference.AutoSparse(thetas, [(WEIGHTS, None)], **settings),
        host=host(optimizer, 0.01, SCHEDULES[schedule]),
        interval=interval,
    )
