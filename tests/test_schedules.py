"""Schedules against their formulas."""

import itertools
import math
import pickle

import pytest

from lightning_sparse.schedules import SCHEDULES, constant, cosine, cubic, linear, sigmoid_cosine_decay
from tests.reference import functional as reference

GRID = [i / 1000 for i in range(1001)]
FORMULAS = {
    constant: lambda p: 1.0,
    cosine: lambda p: math.sin(math.pi * p / 2) ** 2,  # half-angle formula
    cubic: reference.cubic,
    linear: lambda p: p,
    sigmoid_cosine_decay: reference.gradient_annealing_decay,
}


@pytest.mark.parametrize("schedule", FORMULAS, ids=lambda schedule: schedule.__name__)
def test_formula(schedule):
    assert [schedule(p) for p in GRID] == pytest.approx([FORMULAS[schedule](p) for p in GRID], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", [cosine, cubic, linear], ids=lambda schedule: schedule.__name__)
def test_ramps_rise_from_exactly_0_to_exactly_1(schedule):
    values = [schedule(p) for p in GRID]
    assert (values[0], values[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in itertools.pairwise(values))


def test_annealing_falls_from_exactly_1_to_the_end_of_the_sigmoid():
    values = [sigmoid_cosine_decay(p) for p in GRID]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(1 / (1 + math.exp(6)))
    assert all(a > b for a, b in itertools.pairwise(values))


def test_annealing_takes_the_cosine_first_then_the_sigmoid_and_so_on_after_the_middle():
    def falling_cosine(p):
        return (1 + math.cos(math.pi * p)) / 2

    takes_cosine = [
        p for p in (0.02, 0.3, 0.6, 0.9, 0.98) if sigmoid_cosine_decay(p) == pytest.approx(falling_cosine(p))
    ]
    assert takes_cosine == [0.02, 0.6, 0.9]


def test_names_mean_the_functions_of_that_name():
    assert {name: schedule.__name__ for name, schedule in SCHEDULES.items()} == {name: name for name in SCHEDULES}
    assert all(pickle.loads(pickle.dumps(schedule)) is schedule for schedule in SCHEDULES.values())
