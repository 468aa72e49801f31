"""What each check lets through and where it stops; the sentences that users meet are in ``tests/test_bad_input.py``."""

import math

import pytest

from lightning_sparse.engine.checks import (
    check_choice,
    check_fraction,
    check_moment,
    check_number,
    check_overrides,
    check_patterns,
    check_positive,
    check_window,
)

NOT_NUMBERS = [True, False, "0.5", None, [0.5], 1j]
BELOW_ONE, ABOVE_ONE = math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0)


def refuses(error, check, *args, **kwargs):
    """Whether the check raises this very class, with a sentence that ends with what it got."""
    with pytest.raises(error, match=r"^Expected .* but got ") as caught:
        check(*args, **kwargs)
    return caught.type is error


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 0.5, BELOW_ONE])
def test_fraction_accepts(value):
    check_fraction("x", value)
    check_fraction("x", value, one=True)


def test_fraction_stops_at_its_ends():
    assert all(refuses(ValueError, check_fraction, "x", value) for value in (1, 1.0, ABOVE_ONE, -1e-300, math.inf))
    check_fraction("x", 1, one=True)
    check_fraction("x", 1.0, one=True)
    assert all(refuses(ValueError, check_fraction, "x", value, one=True) for value in (ABOVE_ONE, -1e-300, math.nan))
    assert refuses(ValueError, check_fraction, "x", math.nan)


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("check", [check_fraction, check_moment, check_number, check_positive])
def test_what_is_no_number_is_a_type_error(check, value):
    assert refuses(TypeError, check, "x", value)


def test_positive():
    check_positive("x", 1)
    check_positive("x", 10**9)
    assert refuses(ValueError, check_positive, "x", 0)
    assert refuses(ValueError, check_positive, "x", -1)
    assert refuses(TypeError, check_positive, "x", 1.0)


def test_number():
    for value in (-3200, -0.5, 0, 1e300):
        check_number("x", value)
    check_number("x", 0.0, negative=False)
    assert refuses(ValueError, check_number, "x", -1e-300, negative=False)
    assert all(refuses(ValueError, check_number, "x", value) for value in (math.nan, math.inf, -math.inf))


def test_moment_is_an_epoch_or_a_fraction():
    for value in (0, 1, 500, 0.0, 0.5, 1.0):
        check_moment("x", value)
    assert all(
        refuses(ValueError, check_moment, "x", value) for value in (-1, -0.1, ABOVE_ONE, 5.0, math.nan, math.inf)
    )


def test_window_compares_moments_of_the_same_kind():
    for window in [(0, 0), (0.5, 0.5), (2, 5, 5), (0.1, 0.2, 0.2), (3, 0.1), (0.9, 1), (0, 3, 0.1), (0.1, 0.5, 0)]:
        check_window(*window)
    for window in [(1, 0), (0.6, 0.5), (0, 5, 4), (0.1, 0.5, 0.4)]:
        assert refuses(ValueError, check_window, *window)


@pytest.mark.parametrize("patterns", [None, [], ["a"], ("a", "re:b+"), ["(", "a.[", "*"]])  # a glob need not compile
def test_patterns_accept(patterns):
    check_patterns("x", patterns)


@pytest.mark.parametrize("patterns", ["a", "", {"a"}, {"a": None}, ["a", 1], [None], [["a"]], 3, iter(["a"])])
def test_patterns_refuse_what_is_no_list_of_strings(patterns):
    assert refuses(TypeError, check_patterns, "x", patterns)


def test_patterns_refuse_expressions_that_do_not_compile():
    assert refuses(ValueError, check_patterns, "x", ["a", "re:("])


@pytest.mark.parametrize("overrides", [None, {}, {"a": None}, {"a": {"sparsity": 0.0}, "re:b": {"sparsity": 0.99}}])
def test_overrides_accept(overrides):
    check_overrides(overrides, budget=True)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ("a", TypeError),
        (["a"], TypeError),
        ({1: None}, TypeError),
        ({"re:(": None}, ValueError),
        ({"a": 0.5}, ValueError),
        ({"a": {}}, ValueError),
        ({"a": {"sparsty": 0.5}}, ValueError),
        ({"a": {"sparsity": 0.5, "start": 1}}, ValueError),
        ({"a": {"sparsity": 1.0}}, ValueError),
        ({"a": {"sparsity": "0.5"}}, TypeError),
    ],
)
def test_overrides_refuse(overrides, error):
    assert refuses(error, check_overrides, overrides, budget=True)


def test_overrides_of_a_method_without_a_budget():
    check_overrides({"a": None}, budget=False)
    assert refuses(ValueError, check_overrides, {"a": {"sparsity": 0.5}}, budget=False)


def test_choice():
    check_choice("x", "a", iter(["b", "a"]))
    for value in ("c", "A", "", None, 1, ["a"]):
        assert refuses(ValueError, check_choice, "x", value, ["b", "a"])
