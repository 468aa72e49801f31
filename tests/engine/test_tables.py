"""Budgets from a table reach the layers that it names."""

import re
from pathlib import Path

import pytest

from lightning_sparse import GMP, read_budgets
from tests.helpers.models import Classifier, fit

# As the authors of STR lay theirs out, byte order mark included.
STR_TABLE = """\ufeffMetric,Params,FLOPs,Sparsity (%),,
Overall,1000,9000,60.5,81.27,90.23
Backbone,900,8000,61,82,91
Layer 1 - net.0,36,576,25,50,75
Layer 2 - net.3,48,1200,59.25,70.83,91.67
Layer 3 - net.6,600,600,60,80,90.5
Layer 4 - net.8,24,24,0,25,50
AP - pooling,0,100,0,0,0
"""


def write(text):
    Path("budgets.csv").write_text(text, "utf-8")
    return "budgets.csv"


@pytest.mark.parametrize(("column", "expected"), [("81.27", [18, 14, 120, 18]), ("90.23", [9, 4, 57, 12])])
def test_a_table_of_str(column, expected):
    callback = GMP(overrides=read_budgets(write(STR_TABLE), column), start=0, end=1, verbose=False)
    model = Classifier()
    fit(model, callback)
    assert [int((model.net[i].weight != 0).sum()) for i in (0, 3, 6, 8)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "name,sparsity\nnet.0,0.5\nnet.6,0.9\n",
        "name,sparsity (%)\nnet.0,50\n\nnet.6,90\n",
        "layer,ours\nnet.0,50.00%\nnet.6,90.00%\n",
    ],
)
def test_fractions_and_per_cent(text):
    assert read_budgets(write(text)) == {"net.0": {"sparsity": 0.5}, "net.6": {"sparsity": 0.9}}


def test_columns_and_prefix():
    table = write("name,ERK,STR\nconv,10%,20%\n")
    assert read_budgets(table, "STR", prefix="model.") == {"model.conv": {"sparsity": 0.2}}


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("name,ERK,STR\nconv,0.1,0.2\n", None, "Expected argument `column` to be one of ['ERK', 'STR'], but got None."),
        ("name,ERK\nconv,0.1\n", "STR", "Expected argument `column` to be one of ['ERK'], but got 'STR'."),
        (STR_TABLE, "81.2", "but got '81.2'. Did you mean '81.27'?"),
        ("name,ERK\nconv,90\n", None, "Expected argument `conv` to lie in [0, 1), but got 90.0."),
        ("name,ERK\nconv,dense\n", None, "Expected the budget of `conv` to be a number, but got 'dense'."),
    ],
)
def test_mistakes(text, column, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_budgets(write(text), column)


def test_a_name_that_matches_nothing_is_told():
    callback = GMP(overrides=read_budgets(write("name,sparsity\nnet.00,0.5\n")), verbose=False)
    with pytest.raises(ValueError, match=r"'net.00' matches none. Did you mean 'net.0'"):
        fit(Classifier(), callback)
