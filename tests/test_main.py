"""The command line lists the methods, and the documents hold what it writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_sparse import __main__ as program
from lightning_sparse import cards, strategies
from lightning_sparse.export import inspect_checkpoint

ROOT = Path(__file__).parents[1]
METHODS = [vars(strategies)[name] for name in strategies.__all__]


def test_lists_every_method_on_a_line(capsys):
    program.main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == strategies.__all__
    for line, method in zip(lines, METHODS, strict=True):
        assert line.split(maxsplit=1)[1].startswith(method.__doc__.splitlines()[0])
        assert method.card.citation in line
        assert "https" not in line


@pytest.mark.parametrize("method", METHODS, ids=strategies.__all__)
def test_shows_one_method(capsys, method):
    program.main(["methods", method.__name__])
    text = capsys.readouterr().out
    assert text.startswith(f"{method.__name__}  ")
    assert {method.card.criterion, method.card.training_flops} <= set(re.split(r"\n| {2,}", text))
    assert not re.search(r":\w+:`", text)


def test_inspects_a_checkpoint(capsys):
    torch.save({"weight": torch.eye(2), "bias": torch.zeros(2)}, "model.pt")
    program.main(["inspect", "model.pt"])
    assert capsys.readouterr().out == f"{inspect_checkpoint('model.pt')}\n"


def test_runs_as_a_module_and_says_how_to_get_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "lightning_sparse", "methods", "ST3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ST3  Soft thresholds")
    without = "import sys; sys.modules['jsonargparse'] = None; from lightning_sparse.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "The command line needs jsonargparse: pip install 'lightning-sparse[cli]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["method"], "methods"),
        (["methods", "ST4"], "Expected argument `NAME` to be one of ACDC, "),
        (["methods", "--fill", "nowhere.md"], "nowhere.md"),
        (["methods", "--fill", "empty.md"], "`empty.md`: Expected markers `<!-- NAME -->`"),
        (["methods", "--fil"], "--fil"),
        (["inspect"], "inspect.checkpoint"),
        (["inspect", "nowhere.ckpt"], "nowhere.ckpt"),
        (["inspect", "empty.md"], "Expected empty.md to be a safetensors file"),
    ],
)
def test_mistakes_end_in_a_message(capsys, arguments, message):
    Path("empty.md").touch()
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_names_the_package_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    Path("packed.safetensors").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(SystemExit) as caught:
        program.main(["inspect", "packed.safetensors"])
    assert caught.value.code == 2
    assert "pip install zstandard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--help"], "fit methods inspect"),
        (["methods", "--help"], "the method to show"),
        (["inspect", "--help"], "a state dict of torch.save"),
        (["fit", "--help"], "lightning-sparse fit --model package.Model"),
        (["fit", "--method.help=ST3"], "--method.sparsity"),
    ],
)
def test_help(capsys, own_arguments, arguments, word):
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert not caught.value.code
    text = capsys.readouterr().out
    assert all(part in text for part in (word.split() if len(arguments) == 1 else [word]))


# -- fit --------------------------------------------------------------------------------------------------------------

MODEL = """
import lightning as L, torch

class Model(L.LightningModule):
    def __init__(self, width: int = 8, message: str = ""):
        super().__init__()
        self.message = message
        self.body, self.head = torch.nn.Linear(4, width), torch.nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        if self.message:
            raise ValueError(self.message)
        return self.head(self.body(batch).relu()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), 2)
"""
FLAGS = ["accelerator=cpu", "max_epochs=2", "enable_progress_bar=false", "enable_model_summary=false"]
FIT = ["fit", "--seed_everything=0", "--model=tiny.Model", "--data=tiny.Data", *(f"--trainer.{flag}" for flag in FLAGS)]


@pytest.fixture
def own_arguments(monkeypatch):
    """Hide the command line of pytest, about which Lightning would warn, and what ``main`` does to the path."""
    monkeypatch.setattr(sys, "argv", ["lightning-sparse"])
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture
def tiny(own_arguments):
    """A module in the working directory, where the command line looks for models."""
    Path("tiny.py").write_text(MODEL)
    yield
    sys.modules.pop("tiny", None)


def weights_of(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return [weight for weight in state.values() if weight.ndim > 1]


def test_fits_from_the_shell_and_again_from_the_config_it_leaves(tiny):
    # Started like an installed script, -P: without the working directory in Python's path.
    command = [sys.executable, "-P", "-m", "lightning_sparse", *FIT, "--method=ST3", "--method.sparsity=0.75"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "ST3: the trained model" in done.stdout
    [first] = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
    assert sum(int((weight == 0).sum()) for weight in weights_of(first)) == pytest.approx(0.75 * 48, abs=1)

    program.main(["fit", "--config=lightning_logs/version_0/config.yaml"])
    [second] = Path("lightning_logs/version_1/checkpoints").glob("*.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))


def test_fits_dense_without_a_method_and_writes_over_its_config(tiny):
    for _ in range(2):
        program.main([*FIT, "--trainer.logger=false"])
        assert Path("config.yaml").is_file()
    [path] = Path("checkpoints").glob("*-v1.ckpt")
    assert all(weight.ne(0).all() for weight in weights_of(path))


@pytest.mark.parametrize("name", ["SparseTraining", *strategies.__all__])
def test_every_method_by_its_short_name(capsys, own_arguments, name):
    with pytest.raises(SystemExit):
        program.main(["fit", f"--method={name}", "--method.verbose=false", "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["method"]
    assert method["class_path"] == f"lightning_sparse.{name}"
    assert method["init_args"]["verbose"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=tiny.Models"], "module 'tiny' has no attribute 'Models'"),
        (["--method=ST4"], "ST4"),
        (["--method=ST3", "--method.sparsty=0.9"], "Option 'sparsty' is not accepted"),
        (["--method=ST3", "--method.sparsity=1.5"], "Expected argument `sparsity` to lie in [0, 1), but got 1.5."),
        (["--method=ST3", "--method.targets=[neck]"], "to match a parameter, but 'neck' matches none"),
        (["--method.sparsity=0.9", "--method=ST3"], "Option 'sparsity' is not accepted"),  # the order matters
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--ckpt_path=nowhere.ckpt"], "Checkpoint file not found: nowhere.ckpt"),
        (["--data=null"], "`train_dataloader` must be implemented"),
        (["--trainer.devices=0"], "is not a valid input using cpu accelerator"),
    ],
)
def test_mistakes_in_fit_end_in_a_message(capsys, tiny, arguments, message):
    with pytest.raises(SystemExit) as caught:
        program.main([*FIT, "--trainer.logger=false", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_the_users_code_shows_where_it_is(tiny):
    with pytest.raises(ValueError, match=r"^mine$"):
        program.main([*FIT, "--trainer.logger=false", "--model.message=mine"])


@pytest.mark.parametrize("name", ["README.md", "docs/methods.md"])
def test_documents_are_up_to_date(name):
    document = ROOT / name
    text = document.read_text("utf-8")
    assert cards.fill(text, cards.parts(METHODS)) == text, f"{name} is not what the cards say: run `make docs`."
    for method in METHODS:
        assert f"[`{method.__name__}`]" in text


def test_table_of_conformance_has_every_method():
    text = (ROOT / "docs/conformance.md").read_text("utf-8")
    table = text.partition("<!-- conformance -->")[2].partition("<!-- end of conformance -->")[0]
    compared = [row.split(" | ")[0] for row in table.replace("\n| ", "\n").splitlines()]
    missing = [name for name in strategies.__all__ if name not in compared]
    assert not missing, f"docs/conformance.md lacks {missing}: run `make conformance`."


def test_markdown_of_docstrings():
    text = "A :class:`~a.b.C` of ``x``, see :meth:`go`, with :math:`a\n_b`.\n\n"
    text += ".. math:: y\n\n.. math::\n    z\n      + u\n"
    expected = "A `C` of `x`, see `go`, with $`a\n_b`$.\n\n```math\ny\n```\n\n```math\nz\n  + u\n```\n"
    assert cards.markdown(text) == expected
    assert cards.plain(text).startswith("A C of `x`, see go, with a\n_b.")
