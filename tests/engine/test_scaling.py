"""A real gradient scaler: a step that it skips is none, and no method hears of the scale, whatever the kernel."""

import contextlib
import functools
import itertools

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_sparse import SparseTraining
from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.models import Classifier, Gan, fit, snapshot
from tests.helpers.strategies import every_strategy, parametrize, some_strategies

KERNELS = {
    "plain-sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
    "foreach-adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "fused-sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "fused-adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
}


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
