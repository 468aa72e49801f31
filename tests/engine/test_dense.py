"""Law 1: without sparsity and with the plain gradient, training is bit-identical to training without the callback."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_sparse
from lightning_sparse import SparseTraining
from tests.helpers.assertions import assert_different, assert_same
from tests.helpers.models import (
    BATCH_SIZE,
    OPTIMIZERS,
    Classifier,
    Gan,
    ManualClassifier,
    fit,
    make_dataset,
    make_trainer,
)
from tests.helpers.strategies import SETTINGS, every_strategy, parametrize, some_strategies

pytestmark = pytest.mark.filterwarnings("ignore:.*pruned nothing:UserWarning")


class Recorder(Callback):
    """Keeps what was logged, and the state of the random generator, after every batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append((outputs["loss"], torch.get_rng_state()))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:  # which draws from a copy of the generator
            self.rows.append((trainer.callback_metrics["val_loss"].clone(), torch.get_rng_state()))


def run(callbacks, optimizer="sgd", **flags):
    """Train with shuffling, dropout, batch norm, sanity check and validation, all drawing from the global generator."""
    dataset, recorder = make_dataset(), Recorder()
    train = torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True)
    val = torch.utils.data.DataLoader(dataset, 2 * BATCH_SIZE)
    model = Classifier(optimizer=optimizer)
    torch.manual_seed(1)
    trainer = make_trainer(*callbacks, recorder, **flags)
    trainer.fit(model, train, val)
    return model, trainer, recorder


def assert_same_run(actual, expected):
    (model, trainer, recorder), (other, other_trainer, other_recorder) = actual, expected
    assert_same(model.state_dict(), other.state_dict())
    assert_same([o.state_dict() for o in trainer.optimizers], [o.state_dict() for o in other_trainer.optimizers])
    assert_same(recorder.rows, other_recorder.rows)


def test_every_exported_strategy_has_a_setting():
    methods = {getattr(lightning_sparse, name) for name in lightning_sparse.strategies.__all__}
    assert methods | {SparseTraining} <= {cls for setting in SETTINGS.values() for cls in setting.method.__mro__}


@every_strategy
def test_zero_sparsity_is_dense_training(setting):
    assert_same_run(run([setting.build_dense()]), run([]))


@every_strategy
def test_the_settings_differ_from_dense_training(setting):
    assert_different(run([setting.build()])[0], run([])[0])


@parametrize("ST3", "GMP")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_sparsity_with_every_optimizer(setting, optimizer):
    assert_same_run(run([setting.build_dense()], optimizer), run([], optimizer))


@parametrize("AutoSparse", "TopKGradientAnnealing")
@pytest.mark.parametrize(
    "flags",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "16-true"},
        {"precision": "64-true"},
        {"val_check_interval": 0.5, "limit_train_batches": 3, "max_epochs": 2},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": 2, "max_steps": 5},
        {"reload_dataloaders_every_n_epochs": 1},
        {"fast_dev_run": True},
    ],
    ids="-".join,
)
def test_zero_sparsity_under_the_flags_of_the_trainer(setting, flags):
    assert_same_run(run([setting.build_dense()], **flags), run([], **flags))


@some_strategies
@pytest.mark.parametrize("make_model", [ManualClassifier, Gan, functools.partial(Gan, together=True)])
def test_zero_sparsity_in_manual_optimization(setting, make_model):
    sparse, plain = make_model(), make_model()
    trainer, plain_trainer = fit(sparse, setting.build_dense()), fit(plain)
    assert_same(sparse.state_dict(), plain.state_dict())
    assert_same([o.state_dict() for o in trainer.optimizers], [o.state_dict() for o in plain_trainer.optimizers])
