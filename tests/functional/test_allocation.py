"""Budgets of layers: Erdős–Rényi against its definition, and whole numbers that add up."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lightning_sparse.functional import apportion, erdos_renyi
from tests.reference import sparse_to_sparse as reference

SHAPES = [(10, 10), (100, 100), (64, 3, 7, 7), (64, 64, 3, 3), (64, 64, 1, 1), (8, 1, 3, 3), (1000, 512), (1, 4)]
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8)


@given(shapes, st.floats(0, 0.999), st.booleans())
def test_erdos_renyi_is_its_definition(model, sparsity, kernel):
    found = erdos_renyi(model, sparsity, kernel=kernel)
    assert found == pytest.approx(reference.erdos_renyi(model, sparsity, kernel), abs=1e-9)
    assert all(0 <= share < 1 for share in found)


@given(shapes, st.floats(0, 0.999), st.booleans())
def test_erdos_renyi_meets_the_budget(model, sparsity, kernel):
    sizes = [math.prod(shape) for shape in model]
    zeros = sum(size * share for size, share in zip(sizes, erdos_renyi(model, sparsity, kernel=kernel), strict=True))
    assert zeros == pytest.approx(sparsity * sum(sizes), abs=1e-6 * sum(sizes))


@st.composite
def splits(draw):
    room = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    weight = st.floats(0, 1e3, allow_subnormal=False) | st.sampled_from([0.0, 1.0])
    weights = draw(st.lists(weight, min_size=len(room), max_size=len(room)))
    return draw(st.integers(0, sum(room))), weights, room


@given(splits())
def test_apportion_uses_up_the_total_within_the_room(split):
    total, weights, room = split
    parts = apportion(total, weights, room)
    assert sum(parts) == total
    assert all(0 <= part <= size for part, size in zip(parts, room, strict=True))


@given(st.lists(st.integers(1, 99), min_size=1, max_size=6), st.integers(0, 300))
def test_apportion_with_room_for_all_is_that_of_largest_remainders(weights, total):
    shares = [Fraction(total * weight, sum(weights)) for weight in weights]
    expected = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: expected[index] - shares[index])
    parts = apportion(total, weights, [1000] * len(weights))
    assert sum(parts) == total
    assert all(abs(part - share) < 1 + 1e-9 for part, share in zip(parts, shares, strict=True))
    # The order among equal remainders is a matter of rounding.
    ups = [shares[i] - expected[i] for i in order[: total - sum(expected)]]
    assert sorted(float(s - e) for s, e, p in zip(shares, expected, parts, strict=True) if p > e) == pytest.approx(
        sorted(map(float, ups))
    )


def test_what_does_not_fit_is_shared_by_the_others():
    assert apportion(100, [8.0, 1.0, 1.0], [40, 100, 100]) == [40, 30, 30]
    assert apportion(6, [0.0, 0.0, 5.0], [4, 8, 0]) == [2, 4, 0]
