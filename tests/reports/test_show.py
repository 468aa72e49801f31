"""What a user sees: every weight with the verdict on it before training, a summary after it."""

import re

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from lightning_sparse import GMP, ST3
from lightning_sparse.engine.targets import find_targets
from lightning_sparse.reports import Report, Row, show_report, show_targets
from tests.helpers.models import Classifier, fit, make_net


def plain(text):
    """The text without colours and styles."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def table_rows(text):
    """Cells of the table's rows; a folded row is put together again."""
    rows = []
    for line in text.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if rows and not cells[1] and not cells[-2]:  # the shape or the figures stand in the first line
                rows[-1] = [f"{above}{cell}" for above, cell in zip(rows[-1], cells, strict=True)]
            else:
                rows.append(cells)
    return rows


@pytest.fixture(autouse=True)
def file(monkeypatch):
    """The output is no terminal, whatever the environment says."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")


@pytest.fixture
def terminal(file, monkeypatch):
    """Function that makes the output a terminal of some width."""

    def set_width(columns):
        for variable, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": str(columns)}.items():
            monkeypatch.setenv(variable, value)

    return set_width


def test_tables_of_a_training(capsys):
    net = nn.ModuleDict({"net": make_net(), "unused": nn.Embedding(3, 4)})
    model = Classifier(nn.Sequential(*net["net"]))
    model.words = net["unused"]
    callback = ST3(0.5, start=0, end=1, ignore=["net.3"], verbose=True)
    trainer = fit(model, callback, EarlyStopping("val_loss", patience=9))
    before, after = capsys.readouterr().out.split("ST3: the trained model")

    assert table_rows(before) == [
        ["net.0.weight", "4×1×3×3", "yes", "Conv2d"],
        ["net.3.weight", "4×3×2×2", "no", "in `ignore`"],
        ["net.6.weight", "8×75", "yes", "Linear"],
        ["net.8.weight", "3×8", "yes", "Linear"],
        ["words.weight", "3×4", "no", "Embedding stays dense by default"],
        ["6 vectors", "", "no", "fewer than 2 dimensions"],
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{36 + 600 + 24} of {total} parameters are made sparse." in before

    assert table_rows(after) == callback.report().cells()
    assert [cells[0] for cells in table_rows(after)] == callback.targets
    for name, value in {**callback.report().totals, "val_loss": float(trainer.callback_metrics["val_loss"])}.items():
        shown = re.search(rf"^{name} +([\d.]+)( k)?$", after, re.MULTILINE)
        assert float(shown[1]) * (1000 if shown[2] else 1) == pytest.approx(value, rel=1e-3)
    assert "not counted: aten::batch_norm\n" in after


def test_nothing_is_printed_unless_verbose(capsys):
    fit(Classifier(), ST3(0.5, start=0, end=1, verbose=False))
    assert capsys.readouterr().out == ""


def test_values_of_single_layers_are_logged_but_not_listed_twice(capsys):
    fit(Classifier(), GMP(0.5, start=0, end=1, update_every_n_steps=1, log_layers=True))
    out = capsys.readouterr().out
    assert "sparsity/total" in out
    assert "sparsity/layer/" not in out


def rows_of(module, **patterns):
    verdicts = find_targets(module, **patterns)
    return [Row(v.name, tuple(v.parameter.shape), v.treated, v.reason) for v in verdicts]


LONG = "an_encoder_and_its_name"


@pytest.fixture
def deep():
    return nn.ModuleDict({LONG: nn.ModuleDict({LONG: nn.Linear(4, 4)}), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_folded_tables_lose_nothing(capsys, terminal, deep, columns):
    terminal(columns)
    name = f"{LONG}.{LONG}.weight"
    show_targets("ST3", rows_of(deep, overrides={"re:^head|an_expression_that_makes_a_long_reason": None}))
    out = plain(capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= columns
    assert [cells[0] for cells in table_rows(out)] == [name, "head.weight", "2 vectors"]
    assert (name in out) == (columns == 120)

    rows = [Row(name, (4, 4), treated=True, reason="Linear", zeros=8, threshold=0.5, flops=16.0)]
    show_report(Report("ST3", rows, {}), {})
    out = plain(capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= columns
    assert table_rows(out) == [[name, "4×4", "50.00 %", "0.5", "16", "8"]]


def test_names_are_in_one_piece_in_a_file(capsys, deep):
    show_targets("ST3", rows_of(deep))
    assert f"{LONG}.{LONG}.weight" in capsys.readouterr().out


def test_names_are_taken_literally(capsys):
    net = nn.ModuleDict({"[red]": nn.Linear(4, 4, bias=False), ":smile:": nn.Linear(4, 4, bias=False)})
    show_targets("ST3", rows_of(net, overrides={"re:[a-z]mile": None}))
    assert table_rows(capsys.readouterr().out) == [
        ["[red].weight", "4×4", "yes", "Linear"],
        [":smile:.weight", "4×4", "no", "dense by `overrides['re:[a-z]mile']`"],
    ]


def test_flops_are_called_theoretical(capsys):
    show_report(Report("ST3", [], {"flops/inference": 10.0}, {"aten::add": 2}), {})
    assert "FLOPs are theoretical multiply-accumulates per sample; not counted: aten::add\n" in capsys.readouterr().out
    show_report(Report("ST3", [], {"flops/inference": 10.0}), {})
    assert "not counted: nothing\n" in capsys.readouterr().out
    show_report(Report("ST3", [], {"sparsity/total": 0.5}), {})
    assert "FLOPs are" not in capsys.readouterr().out
