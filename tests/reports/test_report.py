"""The report holds what counting in the model gives, in each of its forms."""

import json

import pytest
import torch

from lightning_sparse import ST3
from lightning_sparse.flops import count_flops, readable
from lightning_sparse.reports import Report, Row
from tests.helpers.models import BATCH_SIZE, Classifier, fit, make_batches
from tests.helpers.strategies import SETTINGS, every_strategy


def trained(setting, **kwargs):
    model, callback = Classifier(), setting.build(**kwargs)
    fit(model, callback)
    return model.eval(), callback


@every_strategy
def test_rows_and_totals_are_those_of_the_model(setting):
    model, callback = trained(setting)
    report, flops = callback.report(), count_flops(model, make_batches()[0][0])

    assert report.method == type(callback).__name__
    assert [row.name for row in report.rows] == [name for name, _ in model.named_parameters()]
    assert [row.name for row in report.rows if row.treated] == callback.targets
    for row in report.rows:
        weight = model.get_parameter(row.name).detach()
        assert (row.shape, row.numel) == (tuple(weight.shape), weight.numel())
        if row.treated:
            zeros = int((weight == 0).sum())
            assert (row.zeros, row.sparsity) == (zeros, zeros / weight.numel())
            assert row.threshold == callback.threshold(row.name)
            assert row.flops == flops.by_layer[row.name] / BATCH_SIZE
        else:
            assert (row.zeros, row.sparsity, row.threshold, row.flops) == (None,) * 4
    assert report.totals == callback.metrics()
    assert report.totals["flops/inference"] == pytest.approx(flops.sparse / BATCH_SIZE)
    assert report.totals["flops/inference_ratio"] == pytest.approx(flops.sparse / flops.dense)
    assert report.uncounted.keys() >= {"aten::batch_norm"}


def test_dict_survives_json():
    report = trained(SETTINGS["AutoSparse"])[1].report()
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    for row, entry in zip(report.rows, data["rows"], strict=True):
        assert Row(**{key: value for key, value in entry.items() if key != "sparsity"} | {"shape": row.shape}) == row
        assert (entry["shape"], entry["sparsity"]) == (list(row.shape), row.sparsity)
    assert (data["method"], data["totals"], data["uncounted"]) == ("AutoSparse", report.totals, report.uncounted)


def test_markdown_has_a_line_for_each_treated_weight_and_each_total():
    report = trained(SETTINGS["ST3"])[1].report()
    table, totals = report.to_markdown().split("\n\n")
    header, rule, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header == Report.header()
    assert set(rule) == {"---"}
    assert lines == report.cells()
    assert [line.split(": ")[0] for line in totals.splitlines()] == list(report.totals)
    for line in totals.splitlines():
        name, value = line.split(": ")
        assert float(value) == pytest.approx(report.totals[name], rel=1e-5)


def test_cells():
    rows = [
        Row("a", (2, 4), treated=True, reason="Linear", zeros=6, threshold=0.12345, flops=4_000_000.0),
        Row("b", (), treated=True, reason="Scale"),
        Row("c", (8,), treated=False, reason="fewer than 2 dimensions"),
    ]
    assert Report("ST3", rows, {}).cells() == [
        ["a", "2×4", "75.00 %", "0.1235", "4 M", "1 M"],
        ["b", "", "–", "–", "–", "–"],
    ]


def test_text_is_aligned():
    report = trained(SETTINGS["GMP"])[1].report()
    method, header, *lines = str(report).splitlines()
    assert method == "GMP"
    assert len(lines) == len(report.cells()) + len(report.totals)
    for line, cells in zip(lines, report.cells(), strict=False):
        assert line.split("  ")[0] == cells[0]
        for title, cell in zip(Report.header(), cells, strict=True):
            assert line[header.index(title) :].startswith(cell)
    assert f"sparsity/total: {report.totals['sparsity/total']:.6g}" in lines


def test_before_training_nothing_is_known():
    report = ST3().report()
    assert (report.rows, report.cells()) == ([], [])
    assert str(report).splitlines()[0] == "ST3"


def test_report_follows_the_model():
    model, callback = trained(SETTINGS["ST3"])
    name = callback.targets[0]
    with torch.no_grad():
        model.get_parameter(name).zero_()
    assert callback.report().rows[0].sparsity == 1.0
    assert callback.report().totals["sparsity/total"] == callback.sparsity


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999, "999"),
        (1000, "1 k"),
        (12_345, "12.35 k"),
        (4_089_184_256, "4.089 G"),
        (3e18, "3e+06 T"),
    ],
)
def test_readable_numbers(number, text):
    assert readable(number) == text
