"""Counting zeros."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_sparse.functional.selection import CHUNK, chunks
from lightning_sparse.functional.sharding import local, sum_each

__all__ = ["count_nonzeros", "sparsity", "sum_magnitudes"]


def count_nonzeros(tensors: Sequence[Tensor]) -> Tensor:
    """Count the entries of each tensor that are not zero.

    Args:
        tensors: Any shapes, sharded or not; every rank must enter with its part.

    Returns:
        One integer per tensor, the same on every rank, left on the device.

    Example:
        >>> count_nonzeros([torch.tensor([0.0, -0.0, 1.0]), torch.ones(2)])
        tensor([1, 2])
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.long)
    # Of less than 2^24 numbers float32 holds the exact count, and adds twice as fast as integers.
    scratch = {device: torch.empty(CHUNK, device=device) for device in {tensor.device for tensor in tensors}}
    counts = []
    for tensor in tensors:
        nonzero = scratch[tensor.device]
        sums = [torch.ne(chunk, 0, out=nonzero[: len(chunk)]).sum() for chunk in chunks([local(tensor.detach())])]
        counts.append(torch.stack(sums).long().sum())
    return sum_each(counts, tensors)


def sparsity(tensors: Iterable[Tensor]) -> float:
    """Fraction of zeros among all elements of all tensors.

    Args:
        tensors: Any shapes, sharded or not; nothing at all has sparsity 0.

    Returns:
        Number in ``[0, 1]``.

    Example:
        >>> sparsity([torch.zeros(3), torch.ones(1)])
        0.75
    """
    tensors = list(tensors)
    total = sum(tensor.numel() for tensor in tensors)
    return (total - int(count_nonzeros(tensors).sum())) / total if total else 0.0


def sum_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Add up the magnitudes of each tensor.

    Args:
        tensors: Any shapes, sharded or not; every rank must enter with its part.

    Returns:
        One number per tensor, float64, the same on every rank, left on the device.

    Example:
        >>> sum_magnitudes([torch.tensor([-1.0, 2.0])])
        tensor([3.], dtype=torch.float64)
    """
    sums = [local(tensor.detach()).abs().sum(dtype=torch.float64) for tensor in tensors]
    return sum_each(sums, tensors) if sums else torch.zeros(0, dtype=torch.float64)
