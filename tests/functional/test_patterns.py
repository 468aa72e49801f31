"""Groups of weights against their definition, one position at a time."""

import re

import pytest
import torch

from lightning_sparse.functional import group_scores, parse_pattern, spread_groups, topk_masks
from tests.reference import functional as reference

SHAPES = {
    "2:4": (3, 8),
    "1:2": (2, 4, 3, 3),
    "3:4": (2, 4, 2),
    "block:2x4": (6, 8),
    "block:1x2": (3, 4, 3),
    "channel": (5, 2, 3),
}
patterns = pytest.mark.parametrize(("name", "shape"), SHAPES.items())


@patterns
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_masks_are_those_of_the_definition(name, shape, layout):
    pattern, thetas = parse_pattern(name), [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    if layout == "channels last":
        thetas = [theta.movedim(1, -1).contiguous().movedim(-1, 1) for theta in thetas]
    scores = [group_scores(theta, pattern) for theta in thetas]
    total = sum(score.numel() for score in scores)
    assert total * pattern.group(shape) == sum(theta.numel() for theta in thetas)
    for k in range(0, total + 1, 3):
        masks = [spread_groups(mask, thetas[0], pattern) for mask in topk_masks(scores, k)]
        for mask, expected in zip(masks, reference.patterned_masks(thetas, k, name), strict=True):
            assert torch.equal(mask, expected)


@patterns
def test_equal_weights_go_by_position(name, shape):
    theta, pattern = torch.ones(shape), parse_pattern(name)
    (mask,) = topk_masks([group_scores(theta, pattern)], 4)
    assert torch.equal(spread_groups(mask, theta, pattern), reference.patterned_masks([theta], 4, name)[0])


@pytest.mark.parametrize(
    ("name", "shape", "fits"),
    [
        ("2:4", (3, 8, 1), True),
        ("2:4", (8, 3), False),
        ("2:4", (8,), False),
        ("block:4x1", (8, 3), True),
        ("block:4x1", (6, 4), False),
        ("block:1x4", (6, 6), False),
        ("channel", (3,), True),
    ],
)
def test_shapes_that_divide(name, shape, fits):
    assert parse_pattern(name).fits(shape) == fits


def test_a_vector_has_a_weight_for_a_channel():
    assert group_scores(torch.tensor([1.0, -2.0]), parse_pattern("channel")).tolist() == [1.0, 2.0]


BAD = ["", "4:2", "0:4", "block:0x4", "block:4", "block", "channels", "2:4:8", "-1:4", "block:2:4", "2x4"]


@pytest.mark.parametrize("name", BAD)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"'n:m' with n <= m, 'block:AxB' or 'channel', but got '{re.escape(name)}'"):
        parse_pattern(name)
