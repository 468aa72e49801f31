"""Budgets in which one weight costs more than another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.functional import selection
from lightning_sparse.functional.sharding import is_sharded, local, sum_each

__all__ = ["affordable"]


def affordable(
    tensors: Sequence[Tensor],
    costs: Sequence[int],
    budget: int,
    *,
    signed: bool = False,
    scales: Sequence[float] = (),
) -> int:
    """Count how many of the largest magnitudes of all tensors are within a budget.

    They are bought from the largest down, of equal ones earlier tensors and lower flat indices first, until one does
    not fit: :func:`~lightning_sparse.functional.topk_masks` keeps exactly these. All arithmetic is that of integers.

    Args:
        tensors: Floating-point tensors of any shape, sharded or not.
        costs: What each element of a tensor costs, ``>= 0``, per tensor. There is one counter per distinct cost.
        budget: What all together may cost, ``>= 0``.
        signed: Whether to compare numbers with their signs instead of magnitudes.
        scales: By what each tensor is divided first, if any.

    Returns:
        Number of elements, the same on every rank.

    Raises:
        ValueError: If ``budget`` or a cost is negative.

    Example:
        >>> tensors = [torch.tensor([-3.0, 1.0]), torch.tensor([2.0, 0.5])]
        >>> affordable(tensors, [1, 10], 11), affordable(tensors, [1, 10], 10)
        (2, 1)
    """
    if min([budget, *costs]) < 0:
        raise ValueError(f"Expected arguments `budget` and `costs` to be >= 0, but got {budget} and {list(costs)}.")
    if not tensors:
        return 0
    everything = selection._Pool(tensors, signed, scales)
    scaled = [local(t.detach()) / scales[i] if scales else local(t.detach()) for i, t in enumerate(tensors)]
    if everything.size <= selection._FEW and not any(is_sharded(tensor) for tensor in tensors):
        flat = [everything.keys(tensor.flatten()).to(everything.device) for tensor in scaled]
        prices = [torch.full_like(keys, cost, dtype=torch.long) for keys, cost in zip(flat, costs, strict=True)]
        order = torch.cat(flat).argsort(descending=True, stable=True)
        return int((torch.cat(prices)[order].cumsum(0) <= budget).sum())
    pools = {}
    for cost in sorted(set(costs)):
        group = [index for index, own in enumerate(costs) if own == cost]
        pools[cost] = selection._Pool([tensors[i] for i in group], signed, [scales[i] for i in group if scales])
        pools[cost].dtype = everything.dtype
    low, kept = everything.lowest, 0
    for shift in everything.shifts:
        # How many keys lie in each bin or above it, and what they cost.
        counts = [pool.count(low, shift)[1:].flip(0).cumsum(0).to(everything.device) for pool in pools.values()]
        spent = torch.stack([count * cost for cost, count in zip(pools, counts, strict=True)]).sum(0)
        fits = int(torch.searchsorted(spent, budget, right=True))
        if fits == len(spent):
            return everything.size
        if fits:
            kept += int(sum(count[fits - 1] for count in counts))
            budget -= int(spent[fits - 1])
        low += len(spent) - 1 - fits << shift
    equal = [everything.keys(tensor).eq(low).sum() for tensor in scaled]
    for cost, count in zip(costs, sum_each(equal, tensors).tolist(), strict=True):
        fitting = count if cost * count <= budget else budget // cost
        kept, budget = kept + fitting, budget - cost * fitting
        if fitting < count:
            break
    return kept
