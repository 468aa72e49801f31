"""The command line lists the methods, and the documents hold what it writes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("arguments", [["--help"], ["methods", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert not caught.value.code
    assert "methods" in capsys.readouterr().out


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
