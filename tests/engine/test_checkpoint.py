"""Only models that have reached their sparsity compete for "best"; everything else is as in ``ModelCheckpoint``."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparse import GMP, ST3, SparseModelCheckpoint
from tests.helpers.assertions import count_sparsity, grows
from tests.helpers.models import Classifier, Loader, make_trainer
from tests.helpers.strategies import SETTINGS, parametrize

EPOCHS = 6
# Those that begin below their target and count it by zeros.
# Methods with a ramp from dense weights.
BUDGETS = [
    name
    for name, setting in SETTINGS.items()
    if setting.sparsity and not grows(setting.build()) and not setting.build().rounds
    if setting.build().initial_sparsity == 0.0 and setting.build().end
]


class Worsening(Classifier):
    """A model whose monitored quantity is best at the dense start and worse with every epoch."""

    def training_step(self, batch, batch_idx):
        self.log("train_score", -float(self.current_epoch), on_step=False, on_epoch=True, batch_size=1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("score", -float(self.current_epoch), batch_size=1)


class Witness(Callback):
    """Counts the zeros of the targets at the end of every epoch."""

    def __init__(self, method):
        self.method, self.sparsity = method, []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.sparsity.append(count_sparsity(pl_module, self.method.targets))


def monitor(cls=SparseModelCheckpoint, **kwargs):
    return cls(**{"dirpath": "checkpoints", "monitor": "score", "mode": "max", "filename": "{epoch}", **kwargs})


def train(*callbacks, **flags):
    model = Worsening()
    trainer = make_trainer(*callbacks, enable_checkpointing=True, **{"max_epochs": EPOCHS, **flags})
    trainer.fit(model, Loader(), Loader(seed=1))
    return trainer


def epoch_of(path):
    return int(Path(path).stem.removeprefix("epoch="))


@parametrize(*BUDGETS)
@pytest.mark.parametrize("listed_first", [True, False])
def test_best_is_the_first_model_at_the_target(setting, listed_first):
    method, best, plain = setting.build(), monitor(), monitor(ModelCheckpoint, dirpath="plain")
    witness = Witness(method)
    train(*([best, plain, method] if listed_first else [method, best, plain]), witness)

    assert epoch_of(plain.best_model_path) == 0
    assert witness.sparsity[0] < setting.sparsity - 0.05
    reached = [sparsity > setting.sparsity - 0.01 for sparsity in witness.sparsity]
    assert (
        epoch_of(best.best_model_path) == reached.index(True) == EPOCHS // 2 - 1
    )  # the ramp takes half of the training

    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    saved = [weights[name] for name in method.targets]
    assert sum((t == 0).sum().item() for t in saved) / sum(t.numel() for t in saved) == witness.sparsity[2]


def test_best_among_those_at_the_target_is_the_best():
    best = monitor(mode="min")
    train(SETTINGS["ST3"].build(), best)
    assert epoch_of(best.best_model_path) == EPOCHS - 1


@pytest.mark.parametrize(("save_top_k", "epochs"), [(2, {2, 3}), (-1, {2, 3, 4, 5}), (0, set())])
def test_save_top_k(save_top_k, epochs):
    train(SETTINGS["GMP"].build(), monitor(save_top_k=save_top_k))
    assert {epoch_of(path) for path in Path("checkpoints").glob("*.ckpt")} == epochs


def test_quantities_of_the_training_epoch():
    best = monitor(monitor="train_score", save_on_train_epoch_end=True)
    train(SETTINGS["ST3"].build(), best, limit_val_batches=0)
    assert epoch_of(best.best_model_path) == 2


@parametrize("STR", "AutoSparse")
@pytest.mark.parametrize("min_sparsity", [0.0, 0.6])
def test_min_sparsity_for_methods_without_a_budget(setting, min_sparsity):
    best, method = monitor(min_sparsity=min_sparsity), setting.build()
    witness = Witness(method)
    train(method, best, witness)
    reached = [sparsity >= min_sparsity for sparsity in witness.sparsity]
    assert epoch_of(best.best_model_path) == reached.index(True)
    assert reached[0] == (min_sparsity == 0.0)


@pytest.mark.filterwarnings("ignore:Training ended at sparsity:UserWarning")
@pytest.mark.parametrize("method", [{"end": 7}, {"end": 1, "min_sparsity": 0.9}], ids=str)
def test_last_is_saved_and_best_is_not_when_no_model_qualifies(method):
    best = monitor(save_last=True, min_sparsity=method.pop("min_sparsity", 0.0))
    train(ST3(0.7, start=0, **method, verbose=False), best)
    assert (best.best_model_path, best.best_k_models) == ("", {})
    assert [path.name for path in Path("checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(best.last_model_path, weights_only=True)["global_step"] == EPOCHS * len(Loader())


def test_without_a_monitor_every_epoch_is_saved():
    train(SETTINGS["ST3"].build(), monitor(monitor=None, mode="min", save_top_k=-1))
    assert {epoch_of(path) for path in Path("checkpoints").glob("*.ckpt")} == set(range(EPOCHS))


@pytest.mark.parametrize(("first", "second", "expected"), [(1, 4, 3), (4, 1, 3), (2, 2, 1)])
def test_all_of_several_methods_must_have_reached_their_target(first, second, expected):
    methods = [
        ST3(0.5, start=0, end=first, targets=["net.0"], verbose=False),
        GMP(0.9, start=0, end=second, update_every_n_steps=1, ignore=["net.0"], verbose=False),
    ]
    best = monitor()
    train(*methods, best)
    assert epoch_of(best.best_model_path) == expected


def test_without_a_method_it_is_a_model_checkpoint():
    best = monitor()
    train(best)
    assert epoch_of(best.best_model_path) == 0


def test_resumed_training_remembers_the_best():
    best = monitor(save_last=True)
    train(ST3(0.7, start=0, end=3, verbose=False), best, max_epochs=4)
    again = monitor(save_last=True)
    trainer = make_trainer(ST3(0.7, start=0, end=3, verbose=False), again, enable_checkpointing=True, max_epochs=6)
    trainer.fit(Worsening(), Loader(), Loader(seed=1), ckpt_path="checkpoints/last.ckpt")
    assert again.best_model_path == best.best_model_path
    assert epoch_of(again.best_model_path) == 2


def test_best_model_is_loaded_for_the_test():
    method, best = ST3(0.7, start=0, end=3, verbose=False), monitor()
    trainer = train(method, best)
    trainer.test(trainer.lightning_module, Loader(), ckpt_path="best", verbose=False)
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.lightning_module.state_dict().items())
