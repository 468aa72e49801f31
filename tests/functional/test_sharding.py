"""Selection, counting and projection of sharded tensors are those of the whole ones."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_sparse import functional
from lightning_sparse.functional.sharding import is_sharded, positions, ranks_of, whole
from tests.helpers.assertions import assert_same
from tests.helpers.ranks import spawn

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def make_tensors(dtype):
    """Uneven rows, a single row, a single element, many ties, special numbers, nothing at all."""
    torch.manual_seed(0)
    special = [0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, float("inf"), -float("inf")]
    tensors = [torch.randn(7, 5), torch.randn(1, 9), torch.randn(4, 3, 2, 2), torch.ones(1), torch.ones(6, 6) / 2]
    return [tensor.to(dtype) for tensor in [*tensors, torch.tensor(special), torch.zeros(0, 4)]]


def make_layouts(size):
    """Meshes with placements: split in rows, in columns, in both, twice in the same direction, copied."""
    line = init_device_mesh("cpu", (size,))
    layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if size == 4:
        square = init_device_mesh("cpu", (2, 2))
        both = itertools.product([Shard(0), Shard(1), Replicate()], repeat=2)
        layouts += [(square, list(placements)) for placements in both]
    return layouts


def distribute(tensor, mesh, placements):
    fitting = [p if getattr(p, "dim", 0) < tensor.ndim else Replicate() for p in placements]
    return distribute_tensor(tensor, mesh, fitting, src_data_rank=None)


def check_everything():
    for (mesh, placements), dtype in itertools.product(make_layouts(dist.get_world_size()), DTYPES):
        tensors = make_tensors(dtype)
        sharded = [distribute(tensor, mesh, placements) for tensor in tensors]
        sharded[1] = tensors[1]  # beside one that every rank has in full
        check_selection(tensors, sharded)
        for tensor, parts in zip(tensors, sharded, strict=True):
            check_single(tensor, parts)
        assert functional.count_nonzeros(sharded).tolist() == functional.count_nonzeros(tensors).tolist()


def check_selection(tensors, sharded):
    total = sum(tensor.numel() for tensor in tensors)
    for k in [*range(0, total, 11), total]:
        for signed in (False, True):
            masks = functional.topk_masks(sharded, k, signed=signed)
            assert [is_sharded(mask) for mask in masks] == [is_sharded(parts) for parts in sharded]
            assert_same([whole(mask) for mask in masks], functional.topk_masks(tensors, k, signed=signed))
    costs = [3, 1, 7, 1, 1, 0, 1]
    for budget in (0, 50, 123, 1000):
        assert functional.affordable(sharded, costs, budget) == functional.affordable(tensors, costs, budget)
    for rank in [*range(0, total - 1, 11), total - 2]:
        expected = functional.order_statistics(tensors, [rank, rank + 1])
        for near in (None, torch.tensor(0.5)):
            assert_same(functional.order_statistics(sharded, [rank, rank + 1], near=near), expected)


def check_single(tensor, parts):
    marked = tensor > 0
    at = positions(parts, distribute_like(marked, parts))
    everywhere = torch.zeros(marked.numel(), dtype=torch.long).index_add_(0, at, torch.ones_like(at))
    for group in ranks_of(parts):
        dist.all_reduce(everywhere, group=group)
    assert torch.equal(everywhere.bool(), marked.flatten())
    assert_same(whole(functional.exceeds(parts, 0.3)), functional.exceeds(tensor, 0.3))
    assert_same(whole(functional.soft_threshold(parts, 0.3)), functional.soft_threshold(tensor, 0.3))
    candidates = tensor.abs() > 0.3
    for k in range(0, int(candidates.sum()) + 1, 5):
        among = functional.largest_among(parts.abs(), functional.exceeds(parts, 0.3), k)
        assert_same(whole(among), functional.largest_among(tensor.abs(), candidates, k))
    pattern = functional.parse_pattern("channel")
    scores = functional.group_scores(parts, pattern) if tensor.ndim else tensor
    assert_same(scores, functional.group_scores(tensor, pattern) if tensor.ndim else tensor)
    groups = functional.spread_groups(scores > 0.3, parts, pattern)
    assert is_sharded(groups) == is_sharded(parts)
    assert_same(whole(groups), functional.spread_groups(scores > 0.3, tensor, pattern))
    seed = torch.Generator().manual_seed
    assert_same(whole(functional.draw(parts, seed(1))), functional.draw(tensor, seed(1)))
    totals = functional.sum_magnitudes([parts]), functional.sum_magnitudes([tensor])
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0.0)
    masked = functional.hard_threshold(parts, functional.exceeds(parts, 0.3))
    assert_same(whole(masked), functional.hard_threshold(tensor, functional.exceeds(tensor, 0.3)))
    if tensor.numel() and tensor.isfinite().all():
        rescaled = whole(functional.rescaled_soft_threshold(parts, 0.3))
        rounding = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(
            rescaled, functional.rescaled_soft_threshold(tensor, 0.3), rtol=4 * rounding, atol=rounding
        )


def distribute_like(tensor, parts):
    if not isinstance(parts, DTensor):
        return tensor
    return distribute_tensor(tensor, parts.device_mesh, parts.placements, src_data_rank=None).to_local()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_tensors_are_treated_like_whole_ones(size):
    spawn(check_everything, size)
