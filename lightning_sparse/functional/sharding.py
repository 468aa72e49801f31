"""Tensors whose parts lie on several ranks (DTensor, as FSDP2 and tensor parallelism make them)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

__all__ = [
    "elementwise",
    "is_sharded",
    "like",
    "local",
    "positions",
    "ranks_of",
    "spread",
    "sum_each",
    "sum_over",
    "whole",
]

P = ParamSpec("P")
Ranks = tuple[dist.ProcessGroup, ...]


def is_sharded(tensor: Tensor) -> bool:
    """Whether other ranks hold parts of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part on this rank, which shares memory with the tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """Make a part on each rank into one tensor, laid out like another; the part itself if that is not sharded."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank, all of which must enter; the tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(full: Tensor, tensor: Tensor) -> Tensor:
    """Lay out a tensor that every rank has in full like another one."""
    if not isinstance(tensor, DTensor):
        return full
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def ranks_of(tensor: Tensor, dims: Iterable[int] | None = None) -> Ranks:
    """The groups of ranks over which a tensor is split, one for each dimension of the device mesh that splits it.

    Args:
        tensor: Any tensor; one that is not sharded has none.
        dims: Only those that split one of these dimensions of the tensor.
    """
    if not isinstance(tensor, DTensor):
        return ()
    split = [getattr(placement, "dim", None) for placement in tensor.placements]
    wanted = range(tensor.ndim) if dims is None else set(dims)
    return tuple(tensor.device_mesh.get_group(i) for i, dim in enumerate(split) if dim in wanted)


def sum_over(ranks: Ranks, counts: Tensor) -> Tensor:
    """Add up, in place, what each rank has counted in its part."""
    for group in ranks:
        dist.all_reduce(counts, group=group)
    return counts


def sum_each(counts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Add up one number per tensor over the ranks that share it.

    Args:
        counts: What this rank has counted in its part of each tensor, as scalars.
        tensors: The tensors. Those that are split over the same ranks take one reduction together.

    Returns:
        One number per tensor, the same on all ranks.
    """
    totals = torch.stack([count.to(counts[0].device) for count in counts])
    shared: dict[Ranks, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        shared[ranks_of(tensor)].append(index)
    for ranks, indices in shared.items():
        if ranks:
            totals[indices] = sum_over(ranks, totals[indices])
    return totals


def positions(tensor: Tensor, mask: Tensor) -> Tensor:
    """Flat indices, in the whole tensor, of those entries of the part on this rank that a mask (a part, too) marks."""
    if not isinstance(tensor, DTensor):
        return mask.flatten().nonzero().squeeze(1)
    marked = mask.nonzero()
    flat = torch.zeros(len(marked), dtype=torch.long, device=mask.device)
    for dim, size in enumerate(tensor.shape):
        # Which indices of this dimension lie here: those of a vector that is split in the same way.
        placements = [_moved(placement, dim) for placement in tensor.placements]
        index = torch.arange(size, device=mask.device)
        here = distribute_tensor(index, tensor.device_mesh, placements, src_data_rank=None).to_local()
        flat += here[marked[:, dim]] * math.prod(tensor.shape[dim + 1 :])
    return flat


def _moved(placement: Any, dim: int) -> Placement:
    """The placement of a tensor, for a vector that stands for one of its dimensions."""
    if getattr(placement, "dim", None) != dim:
        return Replicate()
    # FSDP2 over tensor parallelism splits a dimension twice, the inner part in strides.
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(0, **strided)  # type: ignore[no-any-return]


def elementwise(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a function of tensors of one shape work on sharded ones, each rank on its part."""

    @wraps(function)
    def on_parts(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = args[0]
        if not isinstance(first, DTensor):
            return function(*args, **kwargs)
        parts = [local(arg) if isinstance(arg, Tensor) else arg for arg in args]
        named = {key: local(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        return like(function(*parts, **named), first)  # type: ignore[arg-type]

    return on_parts
