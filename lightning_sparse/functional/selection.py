"""Exact selection over a list of tensors, on one device or on many ranks, without sorting or gathering them.

Floating-point numbers order like their bit patterns, read as integers (keys). One counting pass over the upper bits
finds the bucket that holds the wanted rank; a second one, over the lower bits of what lies in that bucket, finds the
number itself. Thresholds move slowly from step to step, so that a window of keys around the last one mostly makes the
first pass superfluous. Of tensors that are spread over ranks each rank counts its part; then the counters, whose number
does not depend on the model, are added up.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse.functional.sharding import Ranks, like, local, positions, ranks_of, spread, sum_each, sum_over

__all__ = [
    "CHUNK",
    "chunks",
    "draw",
    "kth_largest",
    "largest_among",
    "magnitude_quantile",
    "order_statistics",
    "topk_masks",
]

# Small tensors are counted together, so that a model of many small layers needs few kernel launches, large ones in
# pieces that stay in the cache.
CHUNK = 1 << 19
_FOLD = 16
# So few are looked at one by one.
_FEW = 1 << 15
# Each pass resolves so many bits of the keys.
_BITS = 16
_KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Found(NamedTuple):
    """A key, the number of smaller ones and the number of equal ones."""

    key: int
    below: int
    equal: int


def order_statistics(
    tensors: Sequence[Tensor], ranks: Sequence[int], *, near: Tensor | None = None, scales: Sequence[float] = ()
) -> Tensor:
    """Find the magnitudes at the given ranks among all elements of all tensors.

    Args:
        tensors: Floating-point tensors of any shape, sharded or not. Half-precision numbers are compared as float32.
        ranks: Ranks in ascending order of magnitude, ``0`` (smallest) to ``N - 1`` (largest); NaN counts as largest.
        near: A guess, such as the result of the step before. A good one saves a pass; none changes the result.
        scales: By what each tensor is divided first, if any.

    Returns:
        Tensor of shape ``(len(ranks),)``, float32 (float64 if any input is), the same on every rank.

    Raises:
        ValueError: If a rank lies outside ``[0, N - 1]``.

    Example:
        >>> order_statistics([torch.tensor([-3.0, 1.0]), torch.tensor([[2.0], [0.5]])], [0, 3])
        tensor([0.5000, 3.0000])
    """
    pool = _Pool(tensors, scales=scales)
    if not all(0 <= rank < pool.size for rank in ranks):
        raise ValueError(f"Expected argument `ranks` to lie in [0, {pool.size - 1}], but got {list(ranks)}.")
    keys = [found.key for found in pool.find(ranks, near)]
    return torch.tensor(keys, dtype=_KEYS[pool.dtype]).view(pool.dtype).to(pool.device)


def kth_largest(tensors: Sequence[Tensor], k: int, *, near: Tensor | None = None) -> Tensor:
    """Find the k-th largest magnitude among all elements of all tensors.

    Args:
        tensors: Floating-point tensors of any shape, sharded or not.
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


def magnitude_quantile(
    tensors: Sequence[Tensor], q: float, *, near: Tensor | None = None, scales: Sequence[float] = ()
) -> Tensor:
    """Interpolated quantile of the magnitudes of all elements of all tensors.

    Linear interpolation between the order statistics around position ``(N - 1) q``, the convention of NumPy.

    Args:
        tensors: Floating-point tensors of any shape, sharded or not.
        q: In ``[0, 1]``.
        near: A guess, see :func:`order_statistics`.
        scales: By what each tensor is divided first, if any.

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
    around = order_statistics(tensors, [math.floor(position), math.ceil(position)], near=near, scales=scales)
    return torch.lerp(around[0], around[1], position - math.floor(position))


def topk_masks(tensors: Sequence[Tensor], k: int, *, signed: bool = False, near: Tensor | None = None) -> list[Tensor]:
    """Keep the k largest magnitudes, or the k largest numbers, among all elements of all tensors.

    Ties at the threshold are broken by position: earlier tensors first, then lower flat indices.

    Args:
        tensors: Floating-point tensors of any shape, sharded or not.
        k: Number of elements to keep, ``0`` to ``N``.
        signed: Whether to compare numbers with their signs instead of magnitudes.
        near: A guess at the k-th largest, see :func:`order_statistics`.

    Returns:
        One boolean mask per tensor, True = kept, sharded like it, with exactly ``k`` True entries in all.

    Raises:
        ValueError: If ``k`` lies outside ``[0, N]``.

    Example:
        >>> topk_masks([torch.tensor([-3.0, 1.0]), torch.tensor([1.0, 1.0])], 2)
        [tensor([True, True]), tensor([False, False])]
        >>> topk_masks([torch.tensor([-3.0, 1.0])], 1, signed=True)
        [tensor([False,  True])]
    """
    pool = _Pool(tensors, signed)
    if not 0 <= k <= pool.size:
        raise ValueError(f"Expected argument `k` to lie in [0, {pool.size}], but got {k}.")
    if k in (0, pool.size):
        return [torch.full_like(tensor, k > 0, dtype=torch.bool) for tensor in tensors]
    found = pool.find([pool.size - k], near)[0]
    masks = [pool.keys(local(tensor)) >= found.key for tensor in tensors]
    if found.below + k < pool.size:
        _drop_last(tensors, masks, lambda tensor: pool.keys(local(tensor)) == found.key, pool.size - k - found.below)
    return [like(mask, tensor) for mask, tensor in zip(masks, tensors, strict=True)]


def largest_among(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Keep the k largest scores among some entries of a tensor.

    Args:
        scores: Non-negative numbers, any shape, sharded or not.
        candidates: Boolean tensor of the same shape: which entries take part.
        k: Number of entries to keep, ``0`` to the number of candidates.

    Returns:
        Boolean mask like ``candidates``, True = kept.

    Example:
        >>> largest_among(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([False, True, True]), 1)
        tensor([False,  True, False])
    """
    among = torch.where(local(candidates), local(scores), -1.0)
    return topk_masks([like(among, scores)], k, signed=True)[0]


def draw(tensor: Tensor, generator: torch.Generator | None, *, normal: bool = False) -> Tensor:
    """Draw a random number for each entry of a tensor, the same however it is sharded.

    Args:
        tensor: Any shape, sharded or not.
        generator: On the CPU, in the same state on every rank.
        normal: Whether to draw from the standard normal distribution, else uniformly from ``[0, 1)``.

    Returns:
        Tensor like ``tensor``, float32.

    Example:
        >>> draw(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    sample = torch.randn if normal else torch.rand
    numbers = sample(tensor.shape, generator=generator, dtype=torch.float32)
    return spread(numbers.to(tensor.device), tensor)


class _Pool:
    """The elements of all tensors, wherever they lie.

    Args:
        tensors: The tensors.
        signed: Whether their numbers are compared with their signs.
        scales: By what each is divided first, if any.
    """

    def __init__(self, tensors: Sequence[Tensor], signed: bool = False, scales: Sequence[float] = ()) -> None:
        self.signed = signed
        self.size = sum(tensor.numel() for tensor in tensors)
        self.dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._parts: dict[tuple[Ranks, torch.device], list[Tensor]] = defaultdict(list)
        self._scales: dict[tuple[Ranks, torch.device], list[float]] = defaultdict(list)
        for index, tensor in enumerate(tensors):
            place = ranks_of(tensor), tensor.device
            self._parts[place].append(local(tensor.detach()))
            self._scales[place] += scales[index : index + 1]

    @property
    def lowest(self) -> int:
        """The lowest of all keys."""
        return torch.iinfo(_KEYS[self.dtype]).min

    @property
    def shifts(self) -> list[int]:
        """Of how many bits the counting passes make no difference; of none in the end."""
        return [*range(0, torch.iinfo(_KEYS[self.dtype]).bits, _BITS)][::-1]

    def keys(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Integers that order like the numbers to compare; NaN comes last."""
        tensor, integer = tensor.to(self.dtype), _KEYS[self.dtype]
        if not self.signed:
            return torch.abs(tensor, out=None if out is None else out.view(self.dtype)).view(integer)
        bits = torch.where(tensor == tensor, tensor + 0.0, math.nan).view(integer)  # -0 + 0 = 0
        sign = bits >> torch.iinfo(integer).bits - 1
        return torch.bitwise_xor(bits, sign & torch.iinfo(integer).max, out=out)

    def find(self, ranks: Sequence[int], near: Tensor | None = None) -> list[_Found]:
        """The keys at some ranks in ascending order."""
        if self.size <= _FEW and len(self._parts) == 1 and not any(ranks for ranks, _ in self._parts):
            return self._find_few(ranks)
        if near is not None and self.dtype == torch.float32 and math.isfinite(near):
            key = int(self.keys(near.detach().to("cpu", torch.float32)))
            found = self._look(ranks, key - (1 << _BITS - 1))
            if found is not None:
                return found
        low = self.lowest
        for shift in self.shifts[:-1]:
            ends = self.count(low, shift).cumsum(0)
            places = torch.searchsorted(ends, torch.tensor(ranks, device=ends.device), right=True).tolist()
            if len(set(places)) > 1:  # too far apart to be found together
                return [self.find([rank])[0] for rank in ranks]
            low += (places[0] - 1) << shift
        found = self._look(ranks, low)
        assert found is not None
        return found

    def _find_few(self, ranks: Sequence[int]) -> list[_Found]:
        """The same, one by one, where counters would be more than keys."""
        ((place, parts),) = self._parts.items()
        keys = self.keys(torch.cat(list(chunks(parts, self._scales[place]))))
        found = [keys.kthvalue(rank + 1).values for rank in ranks]
        numbers = [torch.stack([key, (keys < key).sum(), (keys == key).sum()]) for key in found]
        return [_Found(*row) for row in torch.stack(numbers).tolist()]

    def _look(self, ranks: Sequence[int], low: int) -> list[_Found] | None:
        """The keys at some ranks, if they lie in the window that starts at ``low``."""
        counts = self.count(low, 0)
        ends = counts.cumsum(0)
        places = torch.searchsorted(ends, torch.tensor(ranks, device=ends.device), right=True)
        inside = ((places > 0) & (places < len(ends))).all()
        at = places.clamp(1, len(ends) - 1)
        numbers = torch.stack([at, ends[at - 1], counts[at], inside.expand_as(at)], 1).tolist()
        if not numbers[0][3]:
            return None
        return [_Found(low + place - 1, below, equal) for place, below, equal, _ in numbers]

    def count(self, low: int, shift: int) -> Tensor:
        """Number of keys below the window, then in each of its bins, which hold ``2 ** shift`` keys each."""
        total = torch.zeros(1 + (1 << _BITS), dtype=torch.long, device=self.device)
        for (ranks, device), parts in self._parts.items():
            flat = chunks(parts, self._scales[ranks, device])
            total += sum_over(ranks, self._count_chunks(flat, low, shift, device)).to(self.device)
        return total

    def _count_chunks(self, flat: Iterable[Tensor], low: int, shift: int, device: torch.device) -> Tensor:
        counts = torch.zeros(1 + (1 << _BITS), dtype=torch.long, device=device)
        integer, high, inside = _KEYS[self.dtype], low + (1 << _BITS + shift) - 1, []
        everything = high - low == 2 * torch.iinfo(integer).max + 1
        scratch = torch.empty(3, min(CHUNK, self.size), dtype=integer, device=device)
        for chunk in flat:
            keys, below, upto = (row[: len(chunk)] for row in scratch)
            self.keys(chunk, out=keys)
            if everything:
                counts[1:] += torch.bincount((keys >> shift) - (low >> shift), minlength=1 << _BITS)
                continue
            # Comparisons into integers, and looking at folded rows before single keys, are fast on CPUs.
            torch.lt(keys, low, out=below)
            torch.le(keys, high, out=upto)
            rows, rest = keys[: len(keys) // _FOLD * _FOLD].view(_FOLD, -1), keys[len(keys) // _FOLD * _FOLD :]
            smaller = below[: rows.numel()].view_as(rows).sum(0, dtype=integer)
            hits = smaller != upto[: rows.numel()].view_as(rows).sum(0, dtype=integer)
            counts[0] += smaller.sum() + below[rows.numel() :].sum()
            near = torch.cat([rows[:, hits.nonzero().squeeze(1)].flatten(), rest])
            inside.append(near[(near >= low) & (near <= high)])
        if inside:
            counts[1:] += torch.bincount(torch.cat(inside) - low >> shift, minlength=1 << _BITS)
        return counts


def chunks(parts: Sequence[Tensor], scales: Sequence[float] = ()) -> Iterator[Tensor]:
    """Yield flat tensors of at most ``CHUNK`` elements that together hold every element once, in any order.

    Args:
        parts: Tensors on one device.
        scales: By what each is divided, if any.
    """
    pending: list[Tensor] = []
    for index, part in enumerate(parts):
        # In the order of memory, so that flattening copies nothing.
        flat = part.permute(sorted(range(part.ndim), key=part.stride, reverse=True)).flatten()
        for piece in torch.split(flat, CHUNK):
            if pending and sum(t.numel() for t in pending) + len(piece) > CHUNK:
                yield torch.cat(pending) if len(pending) > 1 else pending[0]
                pending = []
            pending.append(piece / scales[index] if scales else piece)
    yield torch.cat(pending) if len(pending) > 1 else pending[0]


def _drop_last(tensors: Sequence[Tensor], masks: list[Tensor], ties: Callable[[Tensor], Tensor], surplus: int) -> None:
    """Take the last of the equal entries out of the masks, in place."""
    counts = sum_each([ties(tensor).count_nonzero() for tensor in tensors], tensors).tolist()
    for tensor, mask, count in reversed(list(zip(tensors, masks, counts, strict=True))):
        tie = ties(tensor)
        drop = tie.flatten().nonzero().squeeze(1)
        if count > surplus:
            at = positions(tensor, tie)
            drop = drop[at >= _nth(at, count - surplus, ranks_of(tensor))]
        mask.copy_(mask.flatten().index_fill_(0, drop, False).view(mask.shape))
        surplus -= count
        if surplus <= 0:
            return


def _nth(numbers: Tensor, n: int, ranks: Ranks) -> int:
    """The n-th smallest of distinct integers in ``[0, 2 ** 48)``, in ascending order on each rank."""
    if not ranks:
        return int(numbers[n])
    prefix = 0
    for shift in (2 * _BITS, _BITS, 0):
        within = numbers[numbers >> (shift + _BITS) == prefix] >> shift
        ends = sum_over(ranks, torch.bincount(within & (1 << _BITS) - 1, minlength=1 << _BITS)).cumsum(0)
        digit = int((ends <= n).sum())
        n -= int(ends[digit - 1]) if digit else 0
        prefix = prefix << _BITS | digit
    return prefix
