"""Law 8: what is reported as sparsity is what counting zeros in the model gives."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from tests.helpers.assertions import count_sparsity
from tests.helpers.models import Classifier, Gan, Saver, fit
from tests.helpers.strategies import SETTINGS, every_strategy


class MemoryLogger(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "memory", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


class Counting(Callback):
    """Counts zeros at the end of every epoch and in every validation, and looks at what others can monitor."""

    def __init__(self, sparse):
        self.sparse, self.epochs = sparse, []

    def count(self, model):
        return {
            "sparsity/total": count_sparsity(model, self.sparse.targets),
            "sparsity/model": count_sparsity(model),
            **{f"sparsity/layer/{name}": count_sparsity(model, [name]) for name in self.sparse.targets},
        }

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append((trainer.global_step, self.count(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        for key, value in self.count(pl_module).items():
            assert float(trainer.callback_metrics[key]) == pytest.approx(value)


@every_strategy
@pytest.mark.parametrize("make_model", [Classifier, Gan])
@pytest.mark.parametrize("averaging", [False, True])
def test_logged_sparsity_is_the_number_of_zeros(setting, make_model, averaging):
    model, callback, logger = make_model(), setting.build(log_layers=True), MemoryLogger()
    counting = Counting(callback)
    others = [EMAWeightAveraging(decay=0.5)] if averaging else []
    trainer = fit(model, callback, counting, *others, logger=[logger, CSVLogger(".")], log_every_n_steps=1)
    rows = [(step, metrics) for step, metrics in logger.rows if "sparsity/total" in metrics]
    assert [step for step, _ in rows] == [step for step, _ in counting.epochs]
    for (_, metrics), (_, counted) in zip(rows, counting.epochs, strict=True):
        assert {key: metrics[key] for key in counted} == pytest.approx(counted, abs=1e-12)
    assert [metrics["epoch"] for _, metrics in rows] == [0, 1, 2]
    # After training: the attributes, the report and the model agree.
    total = count_sparsity(model, callback.targets)
    assert callback.sparsity == callback.metrics()["sparsity/total"] == total
    assert callback.report().totals["sparsity/total"] == total
    assert {row.name: row.sparsity for row in callback.report().rows if row.treated} == pytest.approx(
        {name: count_sparsity(model, [name]) for name in callback.targets}
    )
    assert float(trainer.callback_metrics["sparsity/model"]) == pytest.approx(rows[-1][1]["sparsity/model"])


@every_strategy
def test_sparsity_in_the_progress_bar_is_that_of_the_last_batch(setting):
    model, callback, seen = Classifier(), setting.build(), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step:
                seen.append((float(trainer.progress_bar_metrics["sparsity"]), self.counted))

        def on_train_batch_end(self, *args):
            self.counted = count_sparsity(model, callback.targets)

    fit(model, callback, Look(), log_every_n_steps=1)
    assert len(seen) == 11
    assert [shown for shown, _ in seen] == pytest.approx([counted for _, counted in seen])


@every_strategy
def test_budget_is_met_to_the_weight(setting):
    model, callback = Classifier(), setting.build()
    fit(model, callback)
    if setting.sparsity is None:
        assert "sparsity/target" not in callback.metrics()
        return
    weights = [model.get_parameter(name) for name in callback.targets]
    sizes = [weight.numel() for weight in weights]
    pools = [sum(sizes)] if callback.distribution == "global" else sizes
    zeros = sum(int((~callback.mask(name)).sum()) for name in callback.targets)
    assert zeros == pytest.approx(sum(setting.sparsity * size for size in pools), abs=len(pools))
    assert callback.metrics()["sparsity/target"] == pytest.approx(setting.sparsity)
    assert callback.target_reached


@pytest.mark.filterwarnings("ignore:Training ended at sparsity:UserWarning")
def test_a_resumed_run_of_other_sparsity_is_counted_anew():
    fit(Classifier(), SETTINGS["GMP"].build(sparsity=0.5), Saver())
    callback, seen = SETTINGS["GMP"].build(sparsity=0.9), []
    fit(Classifier(), callback)

    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(float(trainer.callback_metrics["sparsity"]))

    model = Classifier()
    fit(model, callback, Look(), ckpt_path="epoch=2.ckpt", max_epochs=4, log_every_n_steps=1)
    assert seen == pytest.approx([count_sparsity(model, callback.targets)] * 4)
    assert seen[0] == pytest.approx(0.5, abs=0.01)


@every_strategy
def test_the_report_follows_the_model_after_training(setting):
    model, callback = Classifier(), setting.build()
    fit(model, callback)
    model.net[6].weight = torch.nn.Parameter(torch.ones_like(model.net[6].weight))
    assert callback.sparsity == count_sparsity(model, callback.targets)


def test_thresholds_are_logged_on_request():
    callback, logger = SETTINGS["ST3"].build(log_layers=True), MemoryLogger()
    fit(Classifier(), callback, logger=logger, log_every_n_steps=1)
    last = [metrics for _, metrics in logger.rows if "sparsity/total" in metrics][-1]
    for name in callback.targets:
        assert last[f"threshold/{name}"] == callback.threshold(name) > 0
    assert not any(key.startswith(("threshold/", "sparsity/layer")) for key in SETTINGS["ST3"].build().metrics())


@pytest.mark.filterwarnings("ignore:Training ended at sparsity:UserWarning")
def test_metrics_can_be_monitored():
    stop = EarlyStopping("sparsity/total", mode="max", stopping_threshold=0.5, check_on_train_epoch_end=True)
    callback = SETTINGS["TopKGradientAnnealing"].build()
    trainer = fit(Classifier(), callback, stop, max_epochs=8)
    assert stop.stopped_epoch == 1
    assert callback.sparsity >= 0.5
    assert isinstance(trainer.callback_metrics["sparsity/total"], torch.Tensor)
