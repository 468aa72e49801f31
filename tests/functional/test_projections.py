"""Projections against their equations, and their behaviour at the edges of floating point."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lightning_sparse.functional import channel_scale, hard_threshold, soft_threshold
from tests.reference import functional as reference

INF, NAN = float("inf"), float("nan")
SHAPES = [(5,), (4, 3), (4, 3, 3, 3), (6, 1, 2, 2), (0, 2)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def weights(shape, dtype=torch.float32):
    """Normal numbers, some zeros of both signs, and some at ±0.5 exactly."""
    theta = torch.randn(shape)
    for index, value in enumerate([0.0, -0.0, 0.5, -0.5]):
        theta.view(-1)[index::7] = value
    return theta.to(dtype)


def same(a, b):
    """Equal to the bit, except that NaN equals NaN."""
    return torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0)) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_soft_threshold_is_its_equation(shape, dtype):
    theta = weights(shape, dtype)
    found = soft_threshold(theta, 0.5)
    assert found.dtype == dtype
    assert torch.equal(found, reference.soft_threshold(theta, 0.5))


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1), st.floats(0, 2.0**99, width=32))
def test_soft_threshold_prunes_what_does_not_exceed_it(values, tau):
    theta = torch.tensor(values)
    found = soft_threshold(theta, tau)
    kept = theta.abs() > tau
    assert torch.equal(found != 0, kept)  # strictly greater, and no kept weight is lost to rounding
    assert torch.equal(found[kept].signbit(), theta[kept].signbit())
    assert not found[~kept].signbit().any()  # no -0
    assert (found.abs() <= theta.abs()).all()
    assert torch.equal(soft_threshold(-theta, tau), -found)
    assert torch.equal(soft_threshold(theta, torch.tensor(tau)), found)


def test_soft_threshold_of_zero_is_the_identity():
    theta = weights((4, 3))
    assert torch.equal(soft_threshold(theta, 0.0), theta)


def test_soft_thresholds_add_up():
    theta = torch.randint(-9, 10, (50,)).float()
    assert torch.equal(soft_threshold(soft_threshold(theta, 2.0), 3.0), soft_threshold(theta, 5.0))


def test_hard_threshold_keeps_to_the_bit():
    theta, mask = weights((4, 3)), torch.rand(4, 3) > 0.5
    found = hard_threshold(theta, mask)
    assert same(found[mask], theta[mask])
    assert same(found[~mask], torch.zeros(int((~mask).sum())))
    assert same(hard_threshold(found, mask), found)


@pytest.mark.parametrize(
    ("theta", "hard", "soft"),
    [(INF, 0.0, INF), (-INF, 0.0, -INF), (NAN, 0.0, NAN), (-0.0, 0.0, 0.0), (-0.25, 0.0, 0.0)],
)
def test_edges(theta, hard, soft):
    """A hard mask removes anything, without 0 * inf or -0; a soft threshold hides no infinity and no NaN."""
    theta = torch.tensor([theta])
    assert same(hard_threshold(theta, torch.tensor([False])), torch.tensor([hard]))
    assert same(soft_threshold(theta, 0.25), torch.tensor([soft]))


def test_subnormal_numbers_survive():
    theta = torch.tensor([3e-45, -3e-45, 1e-45])
    assert torch.equal(soft_threshold(theta, 1e-45), torch.tensor([1e-45, -1e-45, 0.0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 3.0, 100.0])
def test_rescale_is_its_equation(shape, tau):
    theta = weights(shape, torch.float64)
    sparse = soft_threshold(theta, tau)
    torch.testing.assert_close(
        sparse * channel_scale(theta, tau), reference.rescale_channels(sparse, theta, tau), rtol=1e-12, atol=0
    )


def test_rescale_by_hand():
    # First channel: kept 3 of 4, r = (1.5 + 1e-6) / (2 + 1e-6), c = 1.01 / (r + 0.01) = 1.3289.
    # Second channel: nothing is pruned, c = 1. Third: all is pruned, and stays so.
    theta = torch.tensor([[3.0, -1.0], [2.0, -2.0], [1.0, 0.5]])
    found = soft_threshold(theta, 1.0) * channel_scale(theta, 1.0)
    torch.testing.assert_close(found, torch.tensor([[2.6578932, 0.0], [1.0, -1.0], [0.0, 0.0]]))


def test_rescale_of_what_is_dense_changes_nothing():
    theta = weights((4, 3))
    assert torch.equal(channel_scale(theta, 0.0), torch.ones(4, 1))


def test_rescale_creates_no_zero_and_removes_none():
    theta = torch.cat([weights((8, 50)), torch.zeros(1, 50), torch.full((1, 50), 1e-45)])
    for tau in (0.0, 0.5, 2.0):
        sparse = soft_threshold(theta, tau)
        assert torch.equal(sparse * channel_scale(theta, tau) != 0, sparse != 0)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_formats_and_out(memory_format):
    """A memory format is kept and changes no number; ``out`` is written and returned."""
    theta = weights((4, 3, 2, 2))
    mask = theta.abs() > 0.5
    laid_out = theta.contiguous(memory_format=memory_format)
    projections = {
        hard_threshold: lambda t, m: (t, m),
        soft_threshold: lambda t, m: (t, 0.5),
    }
    for project, arguments in projections.items():
        expected = project(*arguments(theta, mask))
        found = project(*arguments(laid_out, mask.contiguous(memory_format=memory_format)))
        assert torch.equal(found, expected)
        assert found.is_contiguous(memory_format=memory_format)
        for other in FORMATS:
            out = torch.full_like(theta, NAN).contiguous(memory_format=other)
            assert project(*arguments(laid_out, mask), out=out) is out
            assert torch.equal(out, expected)
            assert out.is_contiguous(memory_format=other)
    assert torch.equal(laid_out, theta)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_scratch_changes_nothing(memory_format):
    theta = weights((4, 3, 2, 2))
    scratch = torch.full_like(theta, NAN).contiguous(memory_format=memory_format)
    assert torch.equal(channel_scale(theta, 0.5, scratch=scratch), channel_scale(theta, 0.5))
