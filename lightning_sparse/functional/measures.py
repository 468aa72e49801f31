"""Counting zeros."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["count_nonzeros", "count_zeros", "sparsity"]


def count_nonzeros(tensor: Tensor) -> Tensor:
    """Count the entries that are not zero, over all ranks if the tensor is sharded.

    Args:
        tensor: Any shape; every rank must enter with its part of a sharded tensor.

    Returns:
        Integer scalar, the same on every rank, left on the device.

    Example:
        >>> count_nonzeros(torch.tensor([0.0, -0.0, 1.0]))
        tensor(1)
    """
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        total: Tensor = (tensor != 0).sum().full_tensor()  # type: ignore[attr-defined]
        return total
    if tensor.numel() > 1 << 24:
        return (tensor != 0).sum()
    # Up to 2^24, float32 counts exactly, and adds twice as fast as integers.
    return torch.ne(tensor, 0, out=torch.empty_like(tensor, dtype=torch.float32)).sum().long()


def count_zeros(weight: Tensor) -> int:
    """Count the entries that are exactly zero (either sign).

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1.0]))
        2
    """
    return weight.numel() - int(count_nonzeros(weight))


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
