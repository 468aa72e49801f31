"""Law 2 when training is interrupted: the model holds w, nothing is left behind, and training resumes."""

import contextlib
import signal
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint

from lightning_sparse import STR, DeepRewiring
from tests.helpers.assertions import assert_same, assert_sparse, describe, pruned
from tests.helpers.models import Classifier, fit, make_trainer, run
from tests.helpers.probes import LateProbe, Probe, ProbedSGD
from tests.helpers.strategies import every_strategy, parametrize

STEP = 7  # the third batch of the second epoch of four batches


class Bomb(Callback):
    """Raises in one of its hooks."""

    def __init__(self, error, hook):
        self.error, self.hook = error, hook
        setattr(self, hook, self.explode)

    def explode(self, trainer, *args, **kwargs):
        if trainer.global_step >= STEP - (self.hook == "on_before_optimizer_step"):
            raise self.error


class Fragile(Classifier):
    """Raises at a place in the seventh step."""

    def __init__(self, place=None, error=None):
        super().__init__()
        self.place, self.error = place, error

    def explode(self, place):
        if place == self.place and self.global_step == STEP - 1:
            raise self.error

    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch)
        self.explode("forward")
        self.net[6].weight.register_hook(lambda grad: self.explode("backward"))
        optimizer = self.optimizers().optimizer
        optimizer.fail = (self.place, self.error) if self.global_step == STEP - 1 else None
        return loss

    def configure_gradient_clipping(self, *args, **kwargs):
        self.explode("clipping")

    def configure_optimizers(self):
        return ProbedSGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


class Latents(Callback):
    """Remembers the latents at the start of the first batch and after every one."""

    def __init__(self, sparse):
        self.sparse, self.rows = sparse, []

    def take(self):
        return {name: self.sparse.latent(name).clone() for name in self.sparse.targets}

    def on_train_batch_start(self, *args):
        if not self.rows:
            self.rows.append(self.take())

    def on_train_batch_end(self, *args):
        self.rows.append(self.take())


pytestmark = pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")


@pytest.fixture(autouse=True)
def keep_signal_handler():
    """Lightning ignores every further Ctrl+C for good."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupt(setting, place, error):
    """Train until the exception; return the model, the callback and the latents after each batch."""
    model, callback = Fragile(place, error), setting.build()
    latents = Latents(callback)
    probes, saver = [Probe(callback), LateProbe(callback)], OnExceptionCheckpoint(".")
    bombs = [Bomb(error, place)] if place.startswith("on_") else []
    before = describe(model.net)
    trainer = make_trainer(probes[0], latents, *bombs, callback, saver, probes[1])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        run(trainer, model)
    assert [probe.seen["on_exception"] for probe in probes] == [1, 1]
    assert describe(model.net) == before
    assert all(not o._optimizer_step_post_hooks and not o._optimizer_step_pre_hooks for o in trainer.optimizers)
    assert len(trainer.callbacks) == 5 + len(bombs)
    assert_sparse(model, callback)
    return model, callback, latents


# Places of an exception, and how many steps have been taken then.
PLACES = {
    "forward": STEP - 1,
    "backward": STEP - 1,
    "on_before_optimizer_step": STEP - 1,
    "clipping": STEP - 1,
    "before": STEP - 1,
    "after": STEP,
    "on_train_batch_end": STEP,
    "on_before_zero_grad": STEP,
    "on_validation_batch_end": 8,
}


def check_interruption(setting, place, error):
    """The latents are those after the last whole step, in memory and in the checkpoint, and training goes on."""
    model, callback, latents = interrupt(setting, place, error("boom"))
    undisturbed = setting.build()
    whole = Latents(undisturbed)
    fit(Fragile(), whole, undisturbed)
    if place != "after" or not isinstance(callback, DeepRewiring):  # whose own part of a step comes behind it
        assert_same(latents.take(), whole.rows[PLACES[place]])

    resumed_model, resumed = Fragile(), setting.build()
    resumed_latents = Latents(resumed)
    fit(resumed_model, resumed_latents, resumed, ckpt_path="on_exception.ckpt")
    assert_same(resumed_latents.rows[0], latents.take())
    assert_sparse(resumed_model, resumed)
    if setting.sparsity is not None:
        assert pruned(resumed) == pytest.approx(setting.sparsity, abs=0.01)
    return model, callback, latents


@every_strategy
@pytest.mark.parametrize(("place", "error"), [("before", KeyboardInterrupt), ("after", RuntimeError)])
def test_an_interrupted_step_leaves_sparse_weights_and_a_checkpoint_to_resume_from(setting, place, error):
    model, callback, latents = check_interruption(setting, place, error)
    # The same objects train on, too.
    taken, again = latents.take(), Latents(callback)
    model.place = None
    fit(model, again, callback)
    assert_same(again.rows[0], taken)


@parametrize("ST3", "GMP")
@pytest.mark.parametrize("place", sorted(PLACES.keys() - {"before", "after"}))
def test_an_exception_elsewhere_leaves_sparse_weights_and_a_checkpoint_to_resume_from(setting, place):
    check_interruption(setting, place, RuntimeError)


class Catching(Fragile):
    """Has a branch that is used in the second batch only; there the step fails, and the model goes on."""

    def __init__(self):
        super().__init__()
        self.sometimes, self.automatic_optimization = torch.nn.Linear(36, 3), False

    def training_step(self, batch, batch_idx):
        loss, optimizer = self.compute_loss(batch), self.optimizers()
        if batch_idx == 1:
            loss = loss + self.sometimes(batch[0].flatten(1)).square().mean()
        optimizer.optimizer.fail = ("before", RuntimeError("boom")) if batch_idx == 1 else None
        optimizer.zero_grad()
        self.manual_backward(loss)
        with contextlib.suppress(RuntimeError):
            optimizer.step()


@pytest.mark.filterwarnings("ignore:`OptG` has pruned all")  # of a weight that has hardly heard a gradient
@every_strategy
def test_a_failed_step_that_the_user_catches_leaves_no_trace(setting):
    model, callback, thresholds = Catching(), setting.build(**setting.unheard), []
    learned = isinstance(callback, STR) and callback.final_sparsity is None  # else with a factor common to all layers
    latents = Latents(callback)

    class Thresholds(Callback):
        def on_train_batch_end(self, *args):
            if learned:
                thresholds.append([callback.threshold(name) for name in ("net.0.weight", "sometimes.weight")])

    fit(model, Probe(callback), latents, Thresholds(), callback)
    assert_same(latents.rows[2], latents.rows[1])
    assert callback.state_dict()["steps"] == {0: 9}
    if learned:
        ours, theirs = zip(*thresholds, strict=True)
        assert len(set(ours)) == 9
        assert len(set(theirs)) == 1


class Interrupter(Callback):
    """Ctrl+C before the n-th line that ``LatentWeights`` executes from the start of the batch to its end."""

    def __init__(self, line):
        self.lines_left = line

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith("engine/weights.py"):
            return None
        self.lines_left -= event == "line"
        if self.lines_left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.trace

    def on_train_batch_start(self, *args):
        sys.settrace(self.trace)

    def on_train_batch_end(self, *args):
        sys.settrace(None)


AT_ONCE = {"start": 0, "end": 0}


def one_step(setting, *callbacks):
    """Take the one step of a training; return the model, the callback and the latents before and after."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    model, callback = Classifier(net), setting.build(**AT_ONCE if setting.sparsity else {})
    latents = Latents(callback)
    trainer = make_trainer(*callbacks, latents, callback, max_steps=1, limit_val_batches=0)
    with contextlib.suppress(SystemExit):
        run(trainer, model)
    return model, callback, [*latents.rows, latents.take()]


@parametrize("ST3")
def test_an_interrupt_at_any_line_loses_no_latent(setting):
    check_interrupts(setting)


@pytest.mark.slow
@parametrize("ST3-freeze", "TopKGradientAnnealing", "AutoSparse", "GMP")
def test_an_interrupt_at_any_line_loses_no_latent_of_other_methods(setting):
    check_interrupts(setting)


def check_interrupts(setting):
    _, _, (before, after, _) = one_step(setting)
    for line in range(1000):
        interrupter = Interrupter(line)
        model, callback, rows = one_step(setting, interrupter)
        assert_sparse(model, callback)
        if interrupter.lines_left >= 0:  # the whole step takes fewer lines
            break
        if callback.keeps_latent and not callback.freeze:
            assert all(rows[-1][name].equal(before[name]) or rows[-1][name].equal(after[name]) for name in before)
    assert 30 < line < 999
