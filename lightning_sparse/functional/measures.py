"""Counting zeros."""

from collections.abc import Iterable

import torch  # noqa: F401
from torch import Tensor

__all__ = ["count_zeros", "sparsity"]


def count_zeros(weight: Tensor) -> int:
    """Count the entries that are exactly zero (either sign).

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1.0]))
        2
    """
    return weight.numel() - int((weight != 0).sum())


def sparsity(tensors: Iterable[Tensor]) -> float:
    """Fraction of zeros among all elements of all tensors.

    Args:
        tensors: Any shapes; nothing at all has sparsity 0.

    Returns:
        Number in ``[0, 1]``.

    Example:
        >>> sparsity([torch.zeros(3), torch.ones(1)])
        0.75
    """
    zeros = total = 0
    for tensor in tensors:
        zeros += count_zeros(tensor)
        total += tensor.numel()
    return zeros / total if total else 0.0
