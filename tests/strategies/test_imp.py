"""Iterative magnitude pruning against an outer loop of plain trainings, and what goes back between them."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse import IterativeMagnitudePruning, SparseModelCheckpoint
from tests.helpers import conformance
from tests.helpers.assertions import assert_same
from tests.helpers.models import Classifier, Gan, Saver, fit, make_trainer, outcome
from tests.helpers.side_by_side import (
    BATCHES,
    HOSTS,
    TOLERANCE,
    WEIGHTS,
    Net,
    distance,
    hosts_and_dtypes,
    make_data,
    waves,
)  # fmt: skip
from tests.helpers.spent import BATCHES as BATCHES_SPENT
from tests.helpers.spent import assert_spent
from tests.reference.rounds import Masks, train_in_rounds

ROUNDS, EPOCHS, FIRST = 4, 4, 1
TOTAL = EPOCHS + (ROUNDS - 1) * (EPOCHS - FIRST)
LAST = {"rounds": ROUNDS, "epochs_per_round": EPOCHS, "rewind_epoch": FIRST, "verbose": False}
# Without a scheduler of its own, so that the twin can make new ones.
ALONE = {name: lambda thetas, make=make: make(thetas)[0] for name, make in HOSTS.items()}


def one_cycle(optimizer):
    """A schedule that also changes the momentum."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * BATCHES + 1)


def steps(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 3], 0.5)


def compare(pools=((WEIGHTS, 0.7),), *, host="sgd", dtype=torch.float64, schedule=waves, interval="step", **kwargs):
    """Train both ways, for 130 steps; all that they end with must be the same."""

    def configure(thetas):
        optimizer = ALONE[host](thetas)
        for group in optimizer.param_groups:
            group.pop("initial_lr")
        return optimizer

    def with_schedule(thetas):
        optimizer = configure(thetas)
        return optimizer, schedule(optimizer)

    net, data = Net(with_schedule, dtype, interval), make_data(dtype)
    twin, callback = copy.deepcopy(net), IterativeMagnitudePruning(0.7, **{**LAST, **kwargs})
    trainer = make_trainer(callback, max_epochs=TOTAL)
    trainer.fit(net, data)
    method = Masks(dict(twin.named_parameters()), pools)
    taken, optimizer, scheduler = train_in_rounds(
        twin, method, list(data), configure=configure, schedule=schedule, interval=interval, rounds=ROUNDS,
        epochs=EPOCHS, rewind=callback.rounds.rewind, first=callback.rounds.rewind_epoch,
    )  # fmt: skip
    assert trainer.global_step == taken == TOTAL * BATCHES
    found, expected = net.state_dict(), twin.state_dict()
    measured = {
        "weights": max(distance(found[name], expected[name]) for name in expected),
        "wrong in masks": sum(int((callback.mask(name) != method.mask(name)).sum()) for name in WEIGHTS),
        "zeros not as masked": sum(int(((found[name] != 0) != method.mask(name)).sum()) for name in WEIGHTS),
    }
    conformance.record(callback, trainer.optimizers[0], dtype, taken, measured)
    assert measured["wrong in masks"] == measured["zeros not as masked"] == 0
    assert measured["weights"] <= TOLERANCE[dtype]
    state, twins = trainer.optimizers[0].state_dict(), optimizer.state_dict()
    assert [{**group, "foreach": None} for group in state["param_groups"]] == [
        {**group, "foreach": None} for group in twins["param_groups"]
    ]
    assert state["state"].keys() == twins["state"].keys()
    for index, slots in twins["state"].items():
        for key, slot in slots.items():
            assert distance(state["state"][index][key], slot) <= TOLERANCE[dtype], key
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == scheduler.last_epoch
    assert abs(callback.sparsity - 0.7) < 1e-3


@hosts_and_dtypes
@pytest.mark.parametrize("rewind", ["weights", "learning_rate", None])
def test_training_equals_an_outer_loop(host, dtype, rewind):
    compare(host=host, dtype=dtype, rewind=rewind)


@pytest.mark.parametrize("rewind", ["weights", "learning_rate"])
@pytest.mark.parametrize(("schedule", "interval"), [(one_cycle, "step"), (steps, "epoch"), (waves, "epoch")])
def test_schedules_repeat(rewind, schedule, interval):
    compare(rewind=rewind, schedule=schedule, interval=interval)


def test_each_layer_by_itself():
    compare([([name], 0.7) for name in WEIGHTS], distribution="uniform")


def test_training_flops():
    """Ten epochs, of which the first four are dense and four have half the pruning behind them."""
    callback = IterativeMagnitudePruning(0.75, rounds=3, epochs_per_round=4, verbose=False)
    assert_spent(callback, lambda step, density: density)
    assert BATCHES_SPENT * 10 == 60
    assert callback.sparsity == 0.75


class Watch(Callback):
    """Keeps what each epoch begins with, and the sparsity that it ends with."""

    def __init__(self):
        self.begun, self.ended, self.rates = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.begun.append(copy.deepcopy(pl_module.state_dict()))
        self.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.ended.append(float(trainer.callback_metrics["sparsity/total"]))


@pytest.mark.parametrize("listed_first", [True, False])
def test_other_callbacks_see_an_epoch_begin_with_what_was_put_back(listed_first):
    watch = Watch()
    callback = IterativeMagnitudePruning(0.75, rounds=3, epochs_per_round=3, rewind_epoch=1, verbose=False)
    fit(Classifier(), *([watch, callback] if listed_first else [callback, watch]), max_epochs=7)
    assert watch.rates[1] == watch.rates[3] == watch.rates[5] > watch.rates[2] == watch.rates[4] == watch.rates[6]
    assert watch.ended == pytest.approx([0, 0, 0, 0.5, 0.5, 0.75, 0.75], abs=1e-3)  # validated before it is pruned
    for later in (watch.begun[3], watch.begun[5]):
        for name, tensor in watch.begun[1].items():
            expected = torch.where(later[name] == 0, 0.0, tensor) if name in callback.targets else tensor
            assert torch.equal(later[name], expected), name


class ScheduledGan(Gan):
    """Steps both schedulers, too."""

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        return list(optimizers), [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for scheduler in batch_idx % 2 * self.lr_schedulers():
            scheduler.step()


def test_several_optimizers_in_manual_optimization():
    watch, states = Watch(), []

    class States(Callback):
        def on_train_batch_start(self, trainer, *args):
            states.append([len(optimizer.state) for optimizer in trainer.optimizers])

    callback = IterativeMagnitudePruning(0.7, rounds=2, epochs_per_round=2, rewind_epoch=1, verbose=False)
    trainer = fit(ScheduledGan(), watch, States(), callback)
    assert watch.rates[1] == watch.rates[2] != watch.rates[0]
    assert (states[7], states[8]) == ([4, 4], [0, 0])
    assert [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs] == [4, 4]


def test_optimizers_that_are_made_with_state_start_anew():
    sums = []

    class Sums(Callback):
        def on_train_batch_start(self, trainer, *args):
            slots = trainer.optimizers[0].state.values()
            sums.append((sum(float(slot["sum"].sum()) for slot in slots), max(float(slot["step"]) for slot in slots)))

    callback = IterativeMagnitudePruning(0.7, rounds=2, epochs_per_round=1, verbose=False)
    fit(Classifier(optimizer="adagrad"), callback, Sums())
    assert sums[0] == sums[4] == (0.0, 0.0)
    assert sums[3][0] > 0.0
    assert sums[8][1] == 4.0


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("rewind", ["weights", "learning_rate"])
def test_resumed_run_equals_the_uninterrupted_one(optimizer, rewind):
    """Before the epoch to go back to, in it, at the end of rounds, and where nothing will go back any more."""

    def run(ckpt_path=None):
        callback = IterativeMagnitudePruning(
            0.7, rounds=3, epochs_per_round=2, rewind_epoch=1, rewind=rewind, verbose=False
        )
        model, saver = Classifier(optimizer=optimizer), [] if ckpt_path else [Saver()]
        return outcome(fit(model, callback, *saver, ckpt_path=ckpt_path, max_epochs=4), model, callback)

    expected = run()
    for checkpoint in ("step=2", "epoch=0", "step=5", "epoch=1", "step=9", "epoch=2", "step=14"):
        assert_same(run(f"{checkpoint}.ckpt"), expected, checkpoint)
    kept = [torch.load(f"epoch={epoch}.ckpt")["callbacks"] for epoch in (1, 3)]
    (first, last) = [next(iter(state.values()))["rewinder"]["kept"] for state in kept]
    assert (set(first), last) == ({"tensors", "groups", "schedulers"}, {})
    assert len(first["tensors"]) == (len(Classifier().state_dict()) if rewind == "weights" else 0)


def test_rounds_divide_the_training():
    lengths = {}

    class Lengths(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            lengths[trainer.current_epoch] = callback.target_sparsity

    callback = IterativeMagnitudePruning(0.75, rounds=3, rewind_epoch=1, verbose=False)
    fit(Classifier(), callback, Lengths(), max_epochs=8)  # 3 epochs, 2 and 2, and one over
    assert list(lengths.values()) == pytest.approx([0, 0, 0, 0.5, 0.5, 0.75, 0.75, 0.75], abs=1e-3)


def test_only_the_last_round_competes():
    callback = IterativeMagnitudePruning(0.7, rounds=3, epochs_per_round=1, verbose=False)
    best = SparseModelCheckpoint(monitor="val_loss", save_top_k=-1, filename="{epoch}")
    fit(Classifier(), callback, best, max_epochs=4)
    assert sorted(path.rsplit("/")[-1] for path in best.best_k_models) == ["epoch=2.ckpt", "epoch=3.ckpt"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rounds": 1}, ValueError, "Expected argument `rounds` to be at least 2"),
        ({"rounds": 2.5}, TypeError, "Expected argument `rounds` to be a positive int"),
        ({"epochs_per_round": 0}, ValueError, "Expected argument `epochs_per_round` to be a positive int"),
        ({"rewind": "weight"}, ValueError, "Expected argument `rewind` to be one of .* Did you mean 'weights'"),
        ({"rewind_epoch": 0.5}, TypeError, "Expected argument `rewind_epoch` to be an int"),
        ({"rewind_epoch": -1}, ValueError, "Expected argument `rewind_epoch` to lie in"),
        ({"rewind_epoch": 3, "epochs_per_round": 3}, ValueError, "Expected argument `rewind_epoch` to lie in"),
    ],
)
def test_refuses_arguments(kwargs, error, message):
    with pytest.raises(error, match=f"^{message}"):
        IterativeMagnitudePruning(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "flags", "message"),
    [
        ({}, {"max_epochs": -1}, "Expected argument `epochs_per_round` to be an int, as training is open-ended"),
        ({"rounds": 4}, {"max_epochs": 3}, "Expected training to last at least 4 epochs, so that 4 rounds go beyond"),
        ({"rounds": 2, "epochs_per_round": 3}, {}, "Expected the 3 epochs between rewinds to be a multiple of"),
        ({"rounds": 2}, {"max_epochs": 6}, "Expected the 3 epochs between rewinds to be a multiple of"),
    ],
)
def test_refuses_trainings(kwargs, flags, message):
    class Slow(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return [optimizer], [{"scheduler": scheduler, "interval": "epoch", "frequency": 2}]

    with pytest.raises(MisconfigurationException, match=f"^{message}"):
        fit(Slow(), IterativeMagnitudePruning(verbose=False, **kwargs), **flags)
