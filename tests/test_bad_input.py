"""Every mistake gets a sentence of its own, at the earliest moment, and leaves the user's model as it was."""

import copy
import re

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sparse import (
    GMP,
    ST3,
    STR,
    AutoSparse,
    SparseModelCheckpoint,
    SparseTraining,
    ST3Sigma,
    TopKGradientAnnealing,
)
from lightning_sparse.metrics import Sparsity

NAN, INF = float("nan"), float("inf")

# --- when the callback is made ---------------------------------------------------------------------------------------

FRACTION = "to lie in [0, 1), but got"
MOMENT = "to be an int >= 0 (epoch) or a float in [0, 1] (fraction of training), but got"
PATTERNS = "to be a list of patterns (str), but got"

MISTAKES = [
    (ST3, {"sparsity": 1.0}, ValueError, f"Expected argument `sparsity` {FRACTION} 1.0."),
    (GMP, {"sparsity": 1}, ValueError, f"Expected argument `sparsity` {FRACTION} 1."),
    (ST3Sigma, {"sparsity": -0.1}, ValueError, f"Expected argument `sparsity` {FRACTION} -0.1."),
    (ST3, {"sparsity": 90}, ValueError, f"Expected argument `sparsity` {FRACTION} 90."),
    (ST3, {"sparsity": NAN}, ValueError, f"Expected argument `sparsity` {FRACTION} nan."),
    (ST3, {"sparsity": "0.9"}, TypeError, "Expected argument `sparsity` to be a number in [0, 1), but got '0.9'."),
    (GMP, {"sparsity": True}, TypeError, "Expected argument `sparsity` to be a number in [0, 1), but got True."),
    (GMP, {"initial_sparsity": 1.0}, ValueError, f"Expected argument `initial_sparsity` {FRACTION} 1.0."),
    (
        ST3,
        {"start": 10, "end": 5},
        ValueError,
        "Expected argument `end` to be no earlier than `start` = 10, but got 5.",
    ),
    (
        GMP,
        {"start": 0.6, "end": 0.5},
        ValueError,
        "Expected argument `end` to be no earlier than `start` = 0.6, but got 0.5.",
    ),
    (
        ST3,
        {"start": 0, "end": 5, "freeze": 4},
        ValueError,
        "Expected argument `freeze` to be no earlier than `end` = 5, but got 4.",
    ),
    (
        ST3,
        {"start": "5"},
        TypeError,
        "Expected argument `start` to be an int (epoch) or a float in [0, 1] (fraction of training), but got '5'.",
    ),
    (ST3, {"start": -1}, ValueError, f"Expected argument `start` {MOMENT} -1."),
    (ST3, {"end": 50.0}, ValueError, f"Expected argument `end` {MOMENT} 50.0."),
    (ST3, {"end": NAN}, ValueError, f"Expected argument `end` {MOMENT} nan."),
    (ST3, {"freeze": 1.5}, ValueError, f"Expected argument `freeze` {MOMENT} 1.5."),
    (
        ST3,
        {"schedule": "cubik"},
        ValueError,
        "Expected argument `schedule` to be one of ['constant', 'cosine', 'cubic', 'linear'], but got 'cubik'."
        " Did you mean 'cubic'?",
    ),
    (
        GMP,
        {"distribution": "globl"},
        ValueError,
        "Expected argument `distribution` to be one of ['er', 'erk', 'global', 'lamp', 'uniform'], but got 'globl'."
        " Did you mean 'global'?",
    ),
    (
        SparseTraining,
        {"sparsity": 0.5, "projection": "sof"},
        ValueError,
        "Expected argument `projection` to be one of ['hard', 'soft'], but got 'sof'. Did you mean 'soft'?",
    ),
    (
        SparseTraining,
        {"sparsity": 0.5, "gradient": "straight-through"},
        ValueError,
        "Expected argument `gradient` to be one of ['masked', 'straight_through'], but got 'straight-through'."
        " Did you mean 'straight_through'?",
    ),
    (
        GMP,
        {"update_every_n_steps": 0},
        ValueError,
        "Expected argument `update_every_n_steps` to be a positive int, but got 0.",
    ),
    (
        ST3,
        {"update_every_n_steps": 1.5},
        TypeError,
        "Expected argument `update_every_n_steps` to be a positive int, but got 1.5.",
    ),
    (AutoSparse, {"alpha": 1.1}, ValueError, "Expected argument `alpha` to lie in [0, 1], but got 1.1."),
    (TopKGradientAnnealing, {"alpha": -0.1}, ValueError, "Expected argument `alpha` to lie in [0, 1], but got -0.1."),
    (AutoSparse, {"alpha_reset": 1.5}, ValueError, f"Expected argument `alpha_reset` {MOMENT} 1.5."),
    (AutoSparse, {"backward_sparsity": 1.0}, ValueError, f"Expected argument `backward_sparsity` {FRACTION} 1.0."),
    (
        STR,
        {"threshold_init": "-5"},
        TypeError,
        "Expected argument `threshold_init` to be a finite number, but got '-5'.",
    ),
    (
        AutoSparse,
        {"threshold_init": NAN},
        ValueError,
        "Expected argument `threshold_init` to be a finite number, but got nan.",
    ),
    (
        STR,
        {"threshold_weight_decay": "1e-5"},
        TypeError,
        "Expected argument `threshold_weight_decay` to be a finite number >= 0, but got '1e-5'.",
    ),
    (
        AutoSparse,
        {"threshold_weight_decay": -1e-5},
        ValueError,
        "Expected argument `threshold_weight_decay` to be a finite number >= 0, but got -1e-05.",
    ),
    (
        STR,
        {"threshold_weight_decay": NAN},
        ValueError,
        "Expected argument `threshold_weight_decay` to be a finite number >= 0, but got nan.",
    ),
    (
        ST3,
        {"overrides": ["head"]},
        TypeError,
        "Expected argument `overrides` to be a dict of patterns, but got ['head'].",
    ),
    (
        ST3,
        {"overrides": {"head": 0.5}},
        ValueError,
        "Expected `overrides['head']` to be None (stay dense) or {'sparsity': ...}, but got 0.5.",
    ),
    (
        ST3,
        {"overrides": {"head": {"sparsity": 1.5}}},
        ValueError,
        f"Expected argument `overrides['head']['sparsity']` {FRACTION} 1.5.",
    ),
    (
        STR,
        {"overrides": {"head": {"sparsity": 0.5}}},
        ValueError,
        "Expected `overrides['head']` to be None (stay dense), as the method has no budget, but got {'sparsity': 0.5}.",
    ),
    (
        ST3,
        {"overrides": {"re:(": None}},
        ValueError,
        "Expected 're:(' in `overrides` to hold a regular expression after `re:`,"
        " but got missing ), unterminated subpattern at position 0.",
    ),
    *(
        (cls, {name: "Linear"}, TypeError, f"Expected argument `{name}` {PATTERNS} 'Linear'. Write ['Linear'].")
        for cls in (SparseTraining, ST3, ST3Sigma, STR, AutoSparse, TopKGradientAnnealing, GMP)
        for name in ("targets", "ignore")
    ),
    (ST3, {"ignore": [0]}, TypeError, f"Expected argument `ignore` {PATTERNS} [0]."),
    (
        ST3,
        {"targets": ["re:*"]},
        ValueError,
        "Expected 're:*' in `targets` to hold a regular expression after `re:`,"
        " but got nothing to repeat at position 0.",
    ),
    (
        SparseModelCheckpoint,
        {"min_sparsity": 90},
        ValueError,
        "Expected argument `min_sparsity` to lie in [0, 1], but got 90.",
    ),
]


@pytest.mark.parametrize(
    ("cls", "kwargs", "error", "sentence"), MISTAKES, ids=[f"{cls.__name__}-{kwargs}" for cls, kwargs, *_ in MISTAKES]
)
def test_wrong_argument(cls, kwargs, error, sentence):
    if cls is SparseTraining:
        kwargs = {"sparsity": 0.5, **kwargs}
    with pytest.raises(error, match=f"^{re.escape(sentence)}$") as caught:
        cls(**kwargs)
    assert caught.type is error


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_metric_refuses_a_single_string(argument):
    with pytest.raises(TypeError, match=re.escape(f"`{argument}` {PATTERNS} 'weight'. Write ['weight'].")):
        Sparsity(**{argument: "weight"}).update(nn.Linear(2, 2))


# --- when training starts --------------------------------------------------------------------------------------------


class Net(L.LightningModule):
    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.head(self.body(batch[0]).relu()).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 4)), 2)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


FLAGS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 4,
}


def refuse_fit(callbacks, error, sentence, module=None, trainer_class=L.Trainer, **flags):
    """``fit`` raises a sentence that starts like this, and changes no weight, no name and no hook."""
    module = module or Net()
    state = copy.deepcopy(module.state_dict())
    ids = [id(parameter) for parameter in module.parameters()]
    trainer = trainer_class(**{**FLAGS, **flags}, callbacks=callbacks)
    with pytest.raises(error, match=f"^{re.escape(sentence)}") as caught:
        trainer.fit(module)
    assert caught.type is error
    assert [id(parameter) for parameter in module.parameters()] == ids
    assert list(module.state_dict()) == list(state)
    for name, tensor in module.state_dict().items():
        assert tensor.numpy().tobytes() == state[name].numpy().tobytes(), name
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def beside(callback):
    """The callback alone, and after one that would prune the body at once."""
    return [[callback], [GMP(0.5, start=0, end=0, targets=["body"], verbose=False), callback]]


def quiet(cls=GMP, **kwargs):
    return cls(**{"targets": ["head"], "verbose": False, **kwargs})


@pytest.mark.parametrize("argument", ["targets", "ignore", "overrides"])
def test_pattern_that_matches_nothing(argument):
    patterns = {"haed": None} if argument == "overrides" else ["haed"]
    sentence = (
        f"Expected each pattern in `{argument}` to match a parameter, but 'haed' matches none. Did you mean 'head'"
    )
    for callbacks in beside(quiet(**{argument: patterns})):
        refuse_fit(callbacks, ValueError, sentence)


def test_override_of_a_weight_that_stays_dense():
    sentence = "Expected `overrides['head']` to match a weight made sparse, but got head.weight: not in `targets`"
    for callbacks in beside(quiet(targets=["body.weight"], overrides={"head": {"sparsity": 0.5}})):
        refuse_fit(callbacks, ValueError, sentence)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite(value):
    module = Net()
    module.head.weight.data[1, 2] = value
    for callbacks in beside(quiet()):
        refuse_fit(callbacks, ValueError, "Expected weight `head.weight` to be finite", module)


def test_no_trainable_target():
    module = Net()
    module.head.requires_grad_(False)
    sentence = (
        "`GMP` has no trainable target: body.bias: not in `targets`; body.weight: not in `targets`;"
        " head.bias: fewer than 2 dimensions; head.weight: frozen. Choose weights with `targets`."
    )
    for callbacks in beside(quiet()):
        refuse_fit(callbacks, MisconfigurationException, sentence, module)


def test_uninitialised_weights():
    class LazyNet(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(2)

    trainer = L.Trainer(**FLAGS, callbacks=[quiet(targets=None)])
    with pytest.raises(MisconfigurationException, match=r"head\.weight.*not initialised"):
        trainer.fit(LazyNet())


def test_overlapping_callbacks():
    sentence = "`ST3` and `GMP` both target ['head.weight']. Give each its own `targets` or `ignore`."
    refuse_fit([quiet(ST3, targets=["Linear"]), quiet()], MisconfigurationException, sentence)
    sentence = "`GMP` and `ST3` both target ['body.weight', 'head.weight']."
    refuse_fit([quiet(targets=None), quiet(ST3, targets=["*"])], MisconfigurationException, sentence)


def test_the_same_callback_twice():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ST3`"):  # Lightning's own check
        L.Trainer(**FLAGS, callbacks=[ST3(), ST3(0.5)])


def test_lbfgs():
    for callbacks in beside(quiet()):
        sentence = "`GMP` cannot train with `LBFGS`, which evaluates the model more than once a step. Use an optimizer"
        refuse_fit(callbacks, MisconfigurationException, sentence, Net(torch.optim.LBFGS))


@pytest.mark.parametrize(
    "kwargs",
    [{"start": 3, "end": 0.5}, {"start": 0.5, "end": 1}, {"cls": ST3, "start": 0, "end": 3, "freeze": 0.5}],
    ids=str,
)
def test_moments_of_both_kinds_out_of_order(kwargs):
    for callbacks in beside(quiet(**kwargs)):
        refuse_fit(callbacks, MisconfigurationException, "Expected `start` <= `end` <= `freeze`, but ")


@pytest.mark.parametrize(
    ("kwargs", "argument", "value"),
    [
        ({"cls": ST3}, "start", 0.05),
        ({"start": 0}, "end", 0.8),
        ({"cls": ST3, "start": 0, "end": 1, "freeze": 0.9}, "freeze", 0.9),
    ],
)
def test_fractions_of_an_open_ended_training(kwargs, argument, value):
    sentence = (
        f"Expected argument `{argument}` to be an int (epoch), as training is open-ended, but got {value}."
        " Set `max_epochs` or `max_steps` in the Trainer, or give an epoch."
    )
    for callbacks in beside(quiet(**kwargs)):
        refuse_fit(callbacks, MisconfigurationException, sentence, max_epochs=-1)


@pytest.mark.parametrize(
    "kwargs",
    [{"cls": AutoSparse}, {"cls": AutoSparse, "alpha_reset": None}, {"cls": TopKGradientAnnealing, "alpha_reset": 2}],
    ids=str,
)
def test_annealing_over_an_open_ended_training(kwargs):
    sentence = "Gradient Annealing decays `alpha` over the whole training, but training is open-ended. Set `max_epochs`"
    for callbacks in beside(quiet(**kwargs)):
        refuse_fit(callbacks, MisconfigurationException, sentence, max_epochs=-1)


def test_epochs_of_unknown_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.randn(100, 4))

    class StreamingNet(Net):
        def train_dataloader(self):
            return DataLoader(Stream(), 2)

    sentence = (
        "Expected argument `end` to be a float (fraction of training) because the length of the data loader is unknown,"
        " but got 2."
    )
    for callbacks in beside(quiet(start=0, end=2)):
        refuse_fit(callbacks, MisconfigurationException, sentence, StreamingNet(), max_epochs=-1, max_steps=10)


def test_a_strategy_that_keeps_the_weights_elsewhere():
    trainer = L.Trainer(**FLAGS)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    sentence = "`ST3` cannot train with `FSDPStrategy`, which keeps the weights in flat tensors of its own. Use `Model"
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(sentence)}"):
        ST3().setup(trainer, Net(), "fit")


def test_trainer_of_the_other_package():
    class OtherNet(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.optimizer = nn.Linear(4, 8), nn.Linear(8, 2), torch.optim.SGD

        training_step, train_dataloader = Net.training_step, Net.train_dataloader
        configure_optimizers = Net.configure_optimizers

    sentence = "Expected the Trainer to be a `lightning.pytorch.Trainer`, but got a `pytorch_lightning."
    refuse_fit([quiet()], MisconfigurationException, sentence, OtherNet(), pytorch_lightning.Trainer)


@pytest.mark.parametrize("change", [{"format": 0}, {"format": None}], ids=str)
def test_checkpoint_of_another_format(change):
    callback = quiet(ST3)
    trainer = L.Trainer(**FLAGS, callbacks=[callback])
    trainer.fit(Net())
    trainer.save_checkpoint("last.ckpt")
    checkpoint = torch.load("last.ckpt", weights_only=True)
    checkpoint["callbacks"][callback.state_key].update(change)
    torch.save(checkpoint, "other.ckpt")

    module = Net()
    trainer = L.Trainer(**{**FLAGS, "max_epochs": 8}, callbacks=[quiet(ST3)])
    sentence = f"Expected the state of `{callback.state_key}` to have format 2, but got {change['format']}. Resume with"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        trainer.fit(module, ckpt_path="other.ckpt")
    for name, tensor in module.state_dict().items():  # Lightning loads these first
        assert torch.equal(tensor, checkpoint["state_dict"][name])
