"""Exact selection by magnitude over a list of tensors, without sorting or concatenating them.

The magnitudes of floating-point numbers order like their bit patterns. One counting pass over the upper bits finds
the bucket that holds the wanted rank; only the few numbers inside that bucket are then looked at one by one. Thresholds
move slowly from step to step, so that the bracket around the last one mostly makes the counting pass superfluous.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["kth_largest", "magnitude_quantile", "order_statistics", "topk_masks"]

# Small tensors are counted together, so that a model of many small layers needs few kernel launches.
_CHUNK = 1 << 18
# Half the width of the bracket around a guess, relative to it.
_MARGIN = 0.002
# Per key type: bits to drop so that 15 (or 16) upper bits remain.
_KEYS = {torch.float32: (torch.int32, 16), torch.float64: (torch.int64, 48)}


def order_statistics(tensors: Sequence[Tensor], ranks: Sequence[int], *, near: Tensor | None = None) -> Tensor:
    """Find the magnitudes at the given ranks among all elements of all tensors.

    Args:
        tensors: Floating-point tensors of any shape. Half-precision numbers are compared as float32.
        ranks: Ranks in ascending order of magnitude, ``0`` (smallest) to ``N - 1`` (largest); NaN counts as largest.
        near: A guess, such as the result of the step before. A good one saves a pass; none changes the result.

    Returns:
        Tensor of shape ``(len(ranks),)``, float32 (float64 if any input is).

    Raises:
        ValueError: If a rank lies outside ``[0, N - 1]``.

    Example:
        >>> order_statistics([torch.tensor([-3.0, 1.0]), torch.tensor([[2.0], [0.5]])], [0, 3])
        tensor([0.5000, 3.0000])
    """
    total = sum(tensor.numel() for tensor in tensors)
    if not all(0 <= rank < total for rank in ranks):
        raise ValueError(f"Expected argument `ranks` to lie in [0, {total - 1}], but got {list(ranks)}.")
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    integer, shift = _KEYS[dtype]

    found = None
    if near is not None and 0 < near < math.inf:
        margins = torch.tensor([1 - _MARGIN, 1 + _MARGIN], dtype=dtype, device=near.device)
        low, high = (near.to(dtype) * margins).view(integer).tolist()
        found = _look_between(low, high, tensors, ranks, dtype)
    if found is None:
        counts = torch.zeros(1 << 15, dtype=torch.long, device=tensors[0].device)
        for chunk in _magnitudes(tensors, dtype):
            counts += torch.bincount(chunk.view(integer).bitwise_right_shift_(shift), minlength=1 << 15)
        ends = torch.tensor([min(ranks), max(ranks)], device=counts.device)
        first, last = torch.searchsorted(counts.cumsum(0), ends, right=True).tolist()
        found = _look_between(first << shift, ((last + 1) << shift) - 1, tensors, ranks, dtype)
    assert found is not None
    return found


def kth_largest(tensors: Sequence[Tensor], k: int, *, near: Tensor | None = None) -> Tensor:
    """Find the k-th largest magnitude among all elements of all tensors.

    Args:
        tensors: Floating-point tensors of any shape.
        k: ``1`` (largest) to ``N`` (smallest).
        near: A guess, see :func:`order_statistics`.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: If ``k`` lies outside ``[1, N]``.

    Example:
        >>> kth_largest([torch.tensor([-3.0, 1.0]), torch.tensor([2.0])], 2)
        tensor(2.)
    """
    total = sum(tensor.numel() for tensor in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"Expected argument `k` to lie in [1, {total}], but got {k}.")
    return order_statistics(tensors, [total - k], near=near).squeeze(0)


def magnitude_quantile(tensors: Sequence[Tensor], q: float, *, near: Tensor | None = None) -> Tensor:
    """Interpolated quantile of the magnitudes of all elements of all tensors.

    Linear interpolation between the order statistics around position ``(N - 1) q``, the convention of NumPy.

    Args:
        tensors: Floating-point tensors of any shape.
        q: In ``[0, 1]``.
        near: A guess, see :func:`order_statistics`.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: If ``q`` lies outside ``[0, 1]``.

    Example:
        >>> magnitude_quantile([torch.tensor([-3.0, 1.0]), torch.tensor([2.0])], 0.75)
        tensor(2.5000)
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"Expected argument `q` to lie in [0, 1], but got {q}.")
    position = (sum(tensor.numel() for tensor in tensors) - 1) * q
    around = order_statistics(tensors, [math.floor(position), math.ceil(position)], near=near)
    return torch.lerp(around[0], around[1], position - math.floor(position))


def topk_masks(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Keep the k largest magnitudes among all elements of all tensors.

    Ties at the threshold are broken by position: earlier tensors first, then lower flat indices.

    Args:
        tensors: Floating-point tensors of any shape.
        k: Number of elements to keep, ``0`` to ``N``.

    Returns:
        One boolean mask per tensor, True = kept, with exactly ``k`` True entries in all.

    Raises:
        ValueError: If ``k`` lies outside ``[0, N]``.

    Example:
        >>> topk_masks([torch.tensor([-3.0, 1.0]), torch.tensor([1.0, 1.0])], 2)
        [tensor([True, True]), tensor([False, False])]
    """
    total = sum(tensor.numel() for tensor in tensors)
    if k in (0, total):
        return [torch.full_like(tensor, k > 0, dtype=torch.bool) for tensor in tensors]
    threshold = kth_largest(tensors, k)
    # Not `>=`, which would prune a NaN and so hide it.
    masks = [(tensor.abs().to(threshold.dtype) < threshold).logical_not_() for tensor in tensors]
    surplus = sum(int(mask.count_nonzero()) for mask in masks) - k
    for tensor, mask in zip(reversed(tensors), reversed(masks), strict=True):
        if surplus <= 0:
            break
        ties = (tensor.abs().to(threshold.dtype) == threshold).flatten().nonzero().flatten()[-surplus:]
        mask.copy_(mask.flatten().index_fill_(0, ties, False).view(mask.shape))
        surplus -= len(ties)
    return masks


def _look_between(
    low: int, high: int, tensors: Sequence[Tensor], ranks: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """The magnitudes at the ranks, if their bit patterns lie in ``[low, high]``."""
    integer, _ = _KEYS[dtype]
    below, inside = torch.zeros((), dtype=torch.long, device=tensors[0].device), []
    for chunk in _magnitudes(tensors, dtype):
        bits = chunk.view(integer)
        smaller = bits < low
        below += smaller.count_nonzero()
        inside.append(chunk[(bits <= high).logical_xor_(smaller)])
    candidates = torch.cat(inside).sort().values
    places = [rank - int(below) for rank in ranks]
    if min(places) < 0 or max(places) >= len(candidates):
        return None
    return candidates[torch.tensor(places, device=candidates.device)]


def _magnitudes(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield flat, freshly allocated chunks of magnitudes that together hold every element once, in any order."""
    pending: list[Tensor] = []
    for tensor in tensors:
        # In the order of memory, so that flattening copies nothing.
        flat = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).flatten()
        if pending and sum(t.numel() for t in pending) + flat.numel() > _CHUNK:
            yield _magnitude(pending, dtype)
            pending = []
        pending.append(flat)
    yield _magnitude(pending, dtype)


def _magnitude(flat: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(flat) == 1:
        return flat[0].to(dtype).abs()
    return torch.cat([part.to(dtype) for part in flat]).abs_()
