"""Counting nonzeros."""

import pytest
import torch

from lightning_sparse.functional import count_nonzeros, sparsity


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_are_counted_one_by_one(dtype):
    tensor = torch.randint(0, 2, (3, 4, 5, 6)).to(dtype)
    expected = sum(value != 0 for value in tensor.flatten().tolist())
    both = [tensor, tensor.to(memory_format=torch.channels_last)]
    assert count_nonzeros(both).tolist() == [expected, expected]


def test_only_exact_zeros_count():
    assert count_nonzeros([torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("nan"), float("inf")])]) == 4


def test_sparsity_weighs_elements_and_not_tensors():
    assert sparsity([torch.zeros(1), torch.ones(9)]) == 0.1
    assert sparsity(iter([torch.zeros(1), torch.ones(9)])) == 0.1  # read once


@pytest.mark.parametrize("nothing", [[], [torch.ones(0)]])
def test_nothing_is_not_sparse(nothing):
    assert sparsity(nothing) == 0.0


def test_counts_are_exact_beyond_single_precision():
    assert count_nonzeros([torch.ones((1 << 24) + 1, dtype=torch.int8)]) == (1 << 24) + 1
