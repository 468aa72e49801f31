"""Where training stands."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse import AutoSparse, SparseTraining
from lightning_sparse.engine.clock import Clock
from lightning_sparse.schedules import sigmoid_cosine_decay
from lightning_sparse.strategies.annealing import annealed_alpha
from tests.helpers.models import Classifier, Loader, Stream, make_net, make_trainer


def make_clock(max_epochs, batches, max_steps=-1, accumulate=1, optimizers=1):
    trainer = SimpleNamespace(
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        optimizers=[None] * optimizers,
    )
    return Clock.of(trainer, max_epochs)


@pytest.mark.parametrize(
    ("kwargs", "epochs"),
    [
        ({"max_epochs": 10, "batches": 5}, 10),
        ({"max_epochs": 10, "batches": 5, "max_steps": 20}, 4),
        ({"max_epochs": -1, "batches": 5, "max_steps": 12}, 2.4),
        ({"max_epochs": None, "batches": 5, "max_steps": 12, "optimizers": 2}, 1.2),
        ({"max_epochs": 2, "batches": 5, "max_steps": 100}, 2),
        # Three steps an epoch, the last of them after one batch.
        ({"max_epochs": -1, "batches": 5, "max_steps": 6, "accumulate": 2}, 2),
        ({"max_epochs": -1, "batches": 5, "max_steps": 7, "accumulate": 2}, 2.4),
        ({"max_epochs": -1, "batches": 5}, math.inf),
        ({"max_epochs": 3, "batches": math.inf}, 3),
        ({"max_epochs": -1, "batches": math.inf, "max_steps": 7}, 1),
        ({"max_epochs": 3, "batches": 0}, 3),
        ({"max_epochs": 0, "batches": 5}, 0),
    ],
)
def test_length_of_training(kwargs, epochs):
    assert make_clock(**kwargs).epochs == pytest.approx(epochs)


class Recording(SparseTraining):
    def __init__(self, **kwargs):
        super().__init__(0.5, schedule="linear", verbose=False, **kwargs)
        self.progress = []

    def select(self, latents, sparsity, context):
        self.progress.append(context.progress)
        return super().select(latents, sparsity, context)


def record(loader, end, **flags):
    callback = Recording(start=0, end=end)
    make_trainer(callback, **flags).fit(Classifier(make_net(norm=False)), loader, Loader())
    return callback.progress


BY_STEPS = [(7, -1, 1), (5, -1, 2), (4, -1, 3), (3, 2, 1)]  # max_steps, max_epochs, accumulate_grad_batches
BY_EPOCHS = [(-1, 3, 1), (-1, 3, 2)]


@pytest.mark.parametrize(
    ("sized", "max_steps", "max_epochs", "accumulate"),
    [*((True, *flags) for flags in BY_STEPS + BY_EPOCHS), *((False, *flags) for flags in BY_STEPS)],
)
def test_the_ramp_ends_with_the_last_step(sized, max_steps, max_epochs, accumulate):
    loader = Loader() if sized else torch.utils.data.DataLoader(Stream(), None)
    flags = {"max_steps": max_steps, "max_epochs": max_epochs, "accumulate_grad_batches": accumulate}
    progress = record(loader, 1.0, **flags)
    assert len(progress) == (max_steps if max_steps > 0 else 3 * 4 // accumulate)
    assert progress == sorted(progress)
    assert progress[-2] < progress[-1] == 1.0
    if accumulate == 1:
        assert progress == pytest.approx([(i + 1) / len(progress) for i in range(len(progress))])


@pytest.mark.parametrize("end", [2, 0.5])
def test_epochs_of_unknown_length_strike_as_wholes(end):
    progress = record(torch.utils.data.DataLoader(Stream(), None), end, max_epochs=4)
    assert progress == [0.5] * 4 + [1.0] * 8


@pytest.mark.parametrize("end", [1, 0.25, 4 * 0.1])
def test_int_is_an_epoch_and_float_a_fraction_of_training(end):
    epochs = end if isinstance(end, int) else 4 * end
    progress = record(Loader(), end, max_epochs=4)
    assert progress == pytest.approx([min(1.0, (i + 1) / 4 / epochs) for i in range(16)])


@pytest.mark.parametrize(
    ("flags", "arguments", "message"),
    [
        (
            {"max_epochs": -1},
            {"end": 0.5},
            r"Expected argument `end` to be an int \(epoch\), as training is open-ended",
        ),
        (
            {"max_epochs": -1, "max_steps": 5, "sized": False},
            {"start": 1, "end": 2},
            "`start` to be a float .* unknown",
        ),
        (
            {"max_epochs": 4},
            {"start": 3, "end": 0.5},
            "Expected `start` <= `end` <= `freeze`, but they fall `start` on epoch 3, `end` on epoch 2",
        ),
        ({"max_epochs": 4}, {"end": 0.5, "freeze": 1}, "`end` on epoch 2, `freeze` on epoch 1"),
    ],
)
def test_moments_that_the_trainer_does_not_determine(flags, arguments, message):
    loader = Loader() if flags.pop("sized", True) else torch.utils.data.DataLoader(Stream(), None)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(Recording(**arguments), **flags).fit(Classifier(), loader, Loader())


def test_progress_is_rounded_so_that_a_fraction_ends_with_its_epoch():
    clock, end = Clock(100.0, 7.0), Clock(100.0, 7.0).at(0.55, "end")
    assert clock.position(54, 7, 0) < end  # 55.00000000000001
    assert clock.progress(clock.position(54, 7, 0), 0.0, end) == 1.0
    assert clock.progress(clock.position(54, 6, 0), 0.0, end) < 1.0


@pytest.mark.parametrize(("moment", "jump"), [(1, 4), (0.5, 6), (0.3, 4), (1.0, 12)])
def test_a_ramp_without_length_is_a_jump(moment, jump):
    callback, progress = Recording(start=moment, end=moment), []

    class Look(Callback):
        def on_train_batch_end(self, *args):
            progress.append(callback._context().progress)

    make_trainer(callback, Look(), max_epochs=3).fit(Classifier(), Loader(), Loader())
    assert progress == [0.0] * (jump - 1) + [1.0] * (13 - jump)
    assert callback.sparsity == 0.5


@pytest.mark.parametrize("sized", [True, False])
def test_alpha_is_annealed_over_steps_where_epochs_cannot_be_told(sized):
    callback, alphas = AutoSparse(threshold_init=-3.0, alpha_reset=None, verbose=False), []

    class Look(Callback):
        def on_before_optimizer_step(self, *args):
            context = callback._context()
            alphas.append(annealed_alpha(1.0, None, context))

    loader = Loader() if sized else torch.utils.data.DataLoader(Stream(), None)
    make_trainer(callback, Look(), max_steps=8, max_epochs=-1).fit(Classifier(), loader, Loader())
    points = [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5] if sized else [(i + 1) / 8 for i in range(8)]
    assert alphas == pytest.approx([sigmoid_cosine_decay(point) for point in points])
