"""``LightningCLI`` builds every strategy from the command line and from files, and says what is wrong."""

import re
import sys
from typing import get_type_hints

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_sparse
from lightning_sparse import GMP, ST3, AutoSparse, SparseModelCheckpoint, SparseTraining
from lightning_sparse.engine.callback import Common
from lightning_sparse.schedules import cosine, cubic

FLAGS = [
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
STRATEGIES = ["SparseTraining", *lightning_sparse.strategies.__all__]


class Model(L.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        return self.head(self.body(batch).relu()).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch):
    """Hide that of pytest, about which Lightning would warn."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def run(*args, **kwargs) -> LightningCLI:
    return LightningCLI(Model, args=[*args, *FLAGS], **kwargs)


def build(*args) -> list[Callback]:
    """The callbacks of this package that a command line gives."""
    callbacks = run(*args, run=False).trainer.callbacks
    return [callback for callback in callbacks if type(callback).__module__.startswith("lightning_sparse")]


def build_one(name: str, **arguments) -> Callback:
    """The callback of that name, with arguments written as on a command line."""
    settings = [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    (callback,) = build(f"--trainer.callbacks+={name}", *settings)
    return callback


def build_from_file(text: str) -> list[Callback]:
    with open("config.yaml", "w") as file:
        file.write(text)
    return build("--config=config.yaml")


def settings_of(callback: SparseTraining) -> dict:
    """What a strategy was made with, without what it has noted since."""
    return {key: value for key, value in vars(callback).items() if not key.startswith("_")}


def test_fit_trains_a_sparse_model():
    cli = run("fit", "--trainer.max_epochs=4", "--trainer.callbacks+=ST3", "--trainer.callbacks.sparsity=0.75")
    weights = [cli.model.body.weight, cli.model.head.weight]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert abs(zeros - 0.75 * 48) <= 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_by_its_short_name(name):
    cls = vars(lightning_sparse)[name]
    required = {"sparsity": 0.5} if cls is SparseTraining else {}
    callback = build_one(name, **required)
    assert type(callback) is cls
    assert settings_of(callback) == settings_of(cls(**required))


def test_an_int_is_an_epoch_and_a_float_a_fraction():
    for text, moment in [("0", 0), ("1", 1), ("0.0", 0.0), ("1.0", 1.0), ("0.5", 0.5)]:
        callback = build_one("ST3", start="0" if isinstance(moment, int) else "0.0", end=text)
        assert (callback.end, type(callback.end)) == (moment, type(moment))
    assert build_one("ST3").freeze is build_one("ST3", freeze="null").freeze is None
    assert build_one("AutoSparse", alpha_reset="null").alpha_reset is None


def test_lists_and_dicts():
    callback = build_one(
        "GMP", targets="[Linear, 're:bo.y']", ignore="[head.bias]", overrides="{head: null, body: {sparsity: 0.5}}"
    )
    assert callback.patterns == {
        "targets": ["Linear", "re:bo.y"],
        "ignore": ["head.bias"],
        "overrides": {"head": None, "body": {"sparsity": 0.5}},
    }


def test_schedule_by_name_or_as_a_function():
    assert build_one("ST3", schedule="cubic").schedule is cubic
    assert build_one("ST3", schedule="lightning_sparse.schedules.cosine").schedule is cosine


def test_several_callbacks():
    args = ["ST3", "targets=[body]", "AutoSparse", "alpha=0.75", "SparseModelCheckpoint", "monitor=loss", "mode=max"]
    sparse, learned, checkpoint = build(
        "--trainer.enable_checkpointing=true",
        *(f"--trainer.callbacks.{arg}" if "=" in arg else f"--trainer.callbacks+={arg}" for arg in args),
    )
    assert (type(sparse), sparse.patterns["targets"]) == (ST3, ["body"])
    assert (type(learned), learned.alpha) == (AutoSparse, 0.75)
    assert (type(checkpoint), checkpoint.monitor, checkpoint.mode) == (SparseModelCheckpoint, "loss", "max")


def test_file():
    sparse, checkpoint = build_from_file("""
trainer:
  callbacks:
    - class_path: GMP
      init_args:
        sparsity: 0.8
        start: 1
        end: 0.75
        distribution: global
        targets: [Linear]
        overrides:
          head: {sparsity: 0.5}
          re:bod.: null
    - class_path: lightning_sparse.SparseModelCheckpoint
      init_args: {min_sparsity: 0.5, monitor: loss}
""")
    overrides = {"head": {"sparsity": 0.5}, "re:bod.": None}
    expected = GMP(0.8, start=1, end=0.75, distribution="global", targets=["Linear"], overrides=overrides)
    assert settings_of(sparse) == settings_of(expected)
    assert (checkpoint.min_sparsity, checkpoint.monitor) == (0.5, "loss")


def printed_config(capsys, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*args, "--print_config", run=False)
    assert caught.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", STRATEGIES)
def test_printed_config_shows_the_arguments_of_the_method_and_builds_the_same(capsys, name):
    changed = {"targets": "[body]", "verbose": "false"} | ({"sparsity": 0.5} if name == "SparseTraining" else {})
    settings = [f"--trainer.callbacks.{key}={value}" for key, value in changed.items()]
    text = printed_config(capsys, f"--trainer.callbacks+={name}", *settings)

    cls = vars(lightning_sparse)[name]
    (shown,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert shown["class_path"] == f"lightning_sparse.{name}"
    own = [argument for argument in cls.__init__.__annotations__ if argument not in ("return", "common")]
    assert list(shown["init_args"]) == [*own, *(argument for argument in changed if argument not in own)]
    (again,) = build_from_file(text)
    assert settings_of(again) == settings_of(build_one(name, **changed))


def test_help_describes_the_arguments(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Model, args=["--trainer.callbacks.help=ST3"], run=False)
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Fraction of zeros among the targeted weights from ``end`` on" in text
    assert "When the ramp starts: int = epoch, float = fraction of training." in text
    assert "Patterns of weights to leave dense." in text


def test_common_arguments_are_those_of_the_base():
    common, base = get_type_hints(Common), get_type_hints(lightning_sparse.SparseTraining.__init__)
    assert common.items() <= base.items()
    documented = re.findall(r"^ {8}(\w+):", Common.__doc__ or "", flags=re.MULTILINE)
    assert documented == list(common)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("sparsity", "abc", "Expected a <class 'float'>. Got value: abc"),
        ("targets", "Linear", "Expected a <class 'list'>"),
        ("schedule", "cubik", "Expected a typing.Literal['constant', 'cosine', 'cubic', 'linear']"),
        ("sparsty", "0.9", "Option 'sparsty' is not accepted"),
    ],
)
def test_values_of_the_wrong_type_exit_with_a_message(capsys, argument, value, message):
    with pytest.raises(SystemExit) as caught:
        build_one("ST3", **{argument: value})
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert value in error


def test_unknown_strategy_exits_with_a_message(capsys):
    with pytest.raises(SystemExit) as caught:
        build_one("ST4")
    assert caught.value.code == 2
    assert "ST4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("sparsity", "1.5", "Expected argument `sparsity` to lie in [0, 1), but got 1.5."),
        ("end", "2.0", "Expected argument `end` to be an int >= 0 (epoch) or a float in [0, 1] (fraction of training)"),
        ("overrides", "{head: {}}", "Expected `overrides['head']` to be None (stay dense) or {'sparsity': ...}"),
    ],
)
def test_values_out_of_range_raise_the_sentence_of_the_package(argument, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_one("ST3", **{argument: value})
