"""Counted steps are real steps: of any optimizer and window, and none that a gradient scaler skips."""

import contextlib
import functools
import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision

from lightning_sparse import AutoSparse, SparseTraining
from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.by_hand import Windows, train_by_hand
from tests.helpers.models import BATCHES, Classifier, Gan, Loader, fit, make_trainer, snapshot
from tests.helpers.probes import LateProbe, Probe
from tests.helpers.side_by_side import EPOCHS, WEIGHTS, assert_equal_training, host
from tests.helpers.strategies import every_strategy, parametrize, some_strategies
from tests.reference import training as reference

KERNELS = {
    "plain-sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
    "foreach-adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "fused-sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "fused-adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
}


# -- steps that a gradient scaler skips -------------------------------------------------------------------------------


class Scaling(MixedPrecision):
    """A real gradient scaler over float32, where its powers of two are exact."""

    def __init__(self, **kwargs):
        scaler = torch.amp.GradScaler("cpu", **{"growth_interval": 1000, **kwargs})
        super().__init__("16-mixed", "cpu", scaler)

    def autocast_context_manager(self):
        return contextlib.nullcontext()


def train(model, callback, *plugins):
    """Train; return all that must be the same."""
    trainer = fit(model, callback, plugins=list(plugins))
    return {
        "model": snapshot(model),
        "callback": callback.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "metrics": callback.metrics(),
    }


def assert_skipping_changes_nothing(make_model, setting):
    scaling, expected = Scaling(), train(make_model(twin=True), setting.build())
    assert_same(train(make_model(), setting.build(), scaling), expected)
    assert scaling.scaler.get_scale() < 2.0**14  # at least three steps were skipped


class Overflowing(Classifier):
    """Some gradients overflow. The twin, trained without a scaler, has no loss then."""

    def __init__(self, kernel, twin=False):
        super().__init__(schedule=False)
        self.make_optimizer, self.twin, self.calls = KERNELS[kernel], twin, itertools.count()
        self.lr = self.make_optimizer.keywords["lr"]
        # PyTorch's fused SGD goes on with uninitialised momentum if the very first step is skipped.
        self.overflows = (2, 3, 4, 9) if kernel == "fused-sgd" else (0, 3, 4, 9)

    def training_step(self, batch, batch_idx):
        loss, overflow = self.compute_loss(batch), next(self.calls) in self.overflows
        if not overflow:
            return loss
        return None if self.twin else loss * torch.inf


class Unscaling(Overflowing):
    """The user unscales what Lightning leaves to a fused kernel, for example to clip."""

    def on_after_backward(self):
        if not self.twin:
            self.trainer.precision_plugin.scaler.unscale_(self.trainer.optimizers[0])


class ManualOverflowing(Overflowing):
    """Windows of two batches; the twin drops the windows in which a gradient would have overflowed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.overflowed = loss is None or (batch_idx % 2 == 1 and self.overflowed)
        if loss is not None:
            self.manual_backward(loss)
        if batch_idx % 2:
            if not self.overflowed:
                self.optimizers().step()
            self.optimizers().zero_grad()


class Retrying(Overflowing):
    """Steps twice in each batch; what lies between is seen by the second forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            if loss is not None:
                self.manual_backward(loss)
                self.optimizers().step()
            assert_sparse(self, next(c for c in self.trainer.callbacks if isinstance(c, SparseTraining)))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@every_strategy
@pytest.mark.parametrize("kernel", [pytest.param("plain-sgd", marks=pytest.mark.slow), "fused-adamw"])
def test_a_skipped_step_changes_nothing(setting, kernel):
    assert_skipping_changes_nothing(functools.partial(Overflowing, kernel), setting)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@parametrize("AutoSparse")
@pytest.mark.parametrize(
    ("make_model", "kernel"),
    [
        (Overflowing, "plain-sgd"),
        (Overflowing, "foreach-adamw"),
        (Overflowing, "fused-sgd"),
        (Unscaling, "fused-sgd"),
        *itertools.product((ManualOverflowing, Retrying), ("plain-sgd", "fused-sgd")),
    ],
)
def test_a_skipped_step_changes_nothing_whoever_steps(setting, make_model, kernel):
    assert_skipping_changes_nothing(functools.partial(make_model, kernel), setting)


class OverflowingGan(Gan):
    """Every third step of either optimizer overflows."""

    def __init__(self, fused, twin=False):
        super().__init__()
        self.fused, self.twin, self.calls = fused, twin, itertools.count()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.01, fused=self.fused),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9, fused=self.fused),
        )

    def step(self, optimizer, loss, **kwargs):
        optimizer.zero_grad()
        overflow = next(self.calls) % 3 == 1
        if not (overflow and self.twin):
            self.manual_backward(loss * torch.inf if overflow else loss)
            optimizer.step()


@some_strategies
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_of_one_optimizer_is_none_of_the_other(setting, fused):
    assert_skipping_changes_nothing(functools.partial(OverflowingGan, fused), setting)


class Clipping(SparseTraining):
    """Is not linear in the gradient, and remembers what it was given."""

    def __init__(self):
        super().__init__(0.7, verbose=False)
        self.largest = 0.0

    def pull_back(self, latent, grad, context):
        self.largest = max(self.largest, float(grad.abs().max()))
        return grad.clamp(-0.01, 0.01)


@pytest.mark.parametrize("kernel", ["plain-sgd", "fused-sgd", "fused-adamw"])
@pytest.mark.parametrize("scaler", [{"init_scale": 2.0**20}, {"enabled": False}], ids=["scaling", "disabled"])
def test_a_method_hears_gradients_without_their_scale(kernel, scaler):
    runs, callbacks = [], [Clipping(), Clipping()]
    for callback, plugins in zip(callbacks, [[Scaling(**scaler)], []], strict=True):
        model = Overflowing(kernel)
        model.overflows = ()
        runs.append(train(model, callback, *plugins))
    assert_same(runs[0], runs[1])
    assert callbacks[0].largest == callbacks[1].largest > 0.01


@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize("kernel", ["fused-sgd", "fused-adamw"])
@pytest.mark.filterwarnings("ignore:.*pruned nothing:UserWarning")
def test_zero_sparsity_under_a_gradient_scaler_equals_no_callback(setting, kernel):
    models, scalings = [Overflowing(kernel), Overflowing(kernel)], [Scaling(), Scaling()]
    fit(models[0], plugins=[scalings[0]])
    fit(models[1], setting.build_dense(), plugins=[scalings[1]])
    assert_same(snapshot(models[1]), snapshot(models[0]))
    assert scalings[0].scaler.get_scale() == 2.0**12


# -- windows ----------------------------------------------------------------------------------------------------------


class Executions(Callback):
    """Counts how often each optimizer really steps."""

    def on_train_start(self, trainer, pl_module):
        self.counts = dict.fromkeys(range(len(trainer.optimizers)), 0)
        for index, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_post_hook(functools.partial(self.count, index))

    def count(self, index, *_):
        self.counts[index] += 1


def matrices(parameters):
    return [p for p in parameters.values() if p.ndim == 2], [p for p in parameters.values() if p.ndim != 2]


def make_sgd_and_adamw(parameters):
    two, others = matrices(parameters)
    return [torch.optim.SGD(two, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]


def make_muon_and_adamw(parameters):
    two, others = matrices(parameters)
    return [torch.optim.Muon(two, lr=0.02), torch.optim.AdamW(others, lr=0.01, fused=True)]


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
