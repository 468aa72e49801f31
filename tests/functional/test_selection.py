"""Exact selection against sorting, over data types, layouts, ties and every size of counting chunk."""

from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from lightning_sparse.functional import (
    affordable,
    draw,
    kth_largest,
    largest_among,
    magnitude_quantile,
    order_statistics,
    selection,
    topk_masks,
)
from tests.reference import functional as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Both zeros, ties, subnormals of float32 and of float64, and what overflows to infinity in half precision.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 1e-310, 3.4e38, float("inf"), -float("inf")]
SHAPES = [(), (0,), (1,), (7,), (2, 3), (3, 0), (2, 3, 2, 2), (1, 5, 1)]


@st.composite
def tensors(pick, dtypes=DTYPES):
    """A tensor of any data type and memory layout, with many equal magnitudes."""
    shape = pick(st.sampled_from(SHAPES))
    number = st.sampled_from(SPECIAL) | st.floats(-8, 8, width=16) | st.floats(allow_nan=False)
    size = torch.Size(shape).numel()
    values = pick(st.lists(number, min_size=size, max_size=size))
    tensor = torch.tensor(values, dtype=torch.float64).reshape(shape).to(pick(st.sampled_from(dtypes)))
    layout = pick(st.sampled_from(["contiguous", "first dimension fastest", "every other element"]))
    if layout == "first dimension fastest" and shape:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "every other element":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    return tensor


@st.composite
def models(pick, dtypes=DTYPES):
    """A list of tensors with at least one element in all."""
    return pick(st.lists(tensors(dtypes), min_size=1, max_size=5).filter(lambda ts: any(t.numel() for t in ts)))


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


chunks = st.sampled_from([1, 4, 1 << 20]).map(lambda size: mock.patch.object(selection, "CHUNK", size))


@pytest.fixture(scope="module", autouse=True, params=[0, selection._FEW], ids=["counting", "one by one"])
def few(request):
    """Small tensors are also counted like large ones."""
    with mock.patch.object(selection, "_FEW", request.param):
        yield


@given(models(), st.data(), chunks)
def test_order_statistics_are_those_of_sorting(model, data, chunk):
    ranks = data.draw(st.lists(st.integers(0, count(model) - 1), min_size=1, max_size=4))
    with chunk:
        found = order_statistics(model, ranks)
    ordered = reference.sorted_magnitudes(model)
    assert found.tolist() == [ordered[rank] for rank in ranks]
    assert found.dtype == (torch.float64 if any(t.dtype == torch.float64 for t in model) else torch.float32)


@given(models(), st.data(), st.floats(width=32) | st.sampled_from(SPECIAL))
def test_a_guess_changes_nothing(model, data, guess):
    total = sum(tensor.numel() for tensor in model)
    ranks = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=3))
    found = order_statistics(model, ranks)
    for near in (torch.tensor(guess), found[0], found[-1] * 1.001):
        assert torch.equal(order_statistics(model, ranks, near=near), found)


def test_a_good_guess_saves_the_counting_pass():
    weights = [torch.randn(100_000)]
    near = magnitude_quantile(weights, 0.9) * 1.001
    with mock.patch.object(selection, "chunks", wraps=selection.chunks) as passes:
        magnitude_quantile(weights, 0.9, near=near)
        assert passes.call_count == 1
        magnitude_quantile(weights, 0.5, near=near)
        assert passes.call_count == 1 + 3  # a miss, then the upper and the lower bits


@given(models(), st.data(), chunks)
def test_topk_keeps_exactly_k_and_the_earlier_of_equals(model, data, chunk):
    k = data.draw(st.integers(0, count(model)))
    with chunk:
        masks = topk_masks(model, k)
    assert sum(int(mask.sum()) for mask in masks) == k
    for mask, expected, tensor in zip(masks, reference.topk_masks(model, k), model, strict=True):
        assert mask.dtype == torch.bool
        assert mask.device == tensor.device
        assert torch.equal(mask, expected)


def test_topk_of_scalars_spares_those_above_the_tie():
    masks = topk_masks([torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0)], 2)
    assert [bool(mask) for mask in masks] == [True, False, True]


@given(models(), st.data(), chunks)
def test_affordable_are_those_bought_from_the_largest_down(model, data, chunk):
    costs = data.draw(st.lists(st.sampled_from([0, 1, 3, 7, 10**12]), min_size=len(model), max_size=len(model)))
    dearest = sum(cost * tensor.numel() for cost, tensor in zip(costs, model, strict=True))
    budget = data.draw(st.integers(0, dearest + 3))
    with chunk:
        kept = affordable(model, costs, budget)
        assert kept == reference.affordable(model, costs, budget)
        masks = topk_masks(model, kept)
    assert sum(cost * int(mask.sum()) for cost, mask in zip(costs, masks, strict=True)) <= budget


@given(models([torch.float64]), st.data())
def test_affordable_of_scaled_and_of_signed_numbers(model, data):
    costs = data.draw(st.lists(st.integers(1, 9), min_size=len(model), max_size=len(model)))
    scales = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(model), max_size=len(model)))
    budget = data.draw(st.integers(0, 9 * count(model)))
    assert affordable(model, costs, budget, scales=scales) == reference.affordable(model, costs, budget, scales)
    kept = affordable(model, costs, budget, signed=True)
    assert [
        sum(costs[i] * int(m.sum()) for i, m in enumerate(topk_masks(model, k, signed=True))) <= budget
        for k in (kept, min(kept + 1, count(model)))
    ] == [True, kept == count(model)]


def test_affordable_of_many():
    model = [torch.randn(64, 32, 3, 3), torch.randn(100, 640) * 0.1, torch.randn(7).bfloat16()]
    costs = [49, 1, 3]
    magnitudes = torch.cat([tensor.flatten().float() for tensor in model]).abs()
    order = magnitudes.argsort(descending=True, stable=True)
    prices = torch.cat([torch.full((t.numel(),), cost) for t, cost in zip(model, costs, strict=True)])[order].cumsum(0)
    for budget in (0, 48, 100_000, int(prices[-1]) - 1, int(prices[-1])):
        assert affordable(model, costs, budget) == int((prices <= budget).sum())


def test_negative_costs_are_refused():
    with pytest.raises(ValueError, match=r"`budget` and `costs` to be >= 0, but got 1 and \[-2\]\."):
        affordable([torch.ones(3)], [-2], 1)


@given(models(), st.data())
def test_kth_largest_counts_from_the_top(model, data):
    k = data.draw(st.integers(1, count(model)))
    assert float(kth_largest(model, k)) == reference.sorted_magnitudes(model)[-k]


@given(models([torch.float64]), st.floats(0, 1))
def test_quantile_is_that_of_numpy(model, q):
    model = [tensor.clamp(-1e300, 1e300) for tensor in model]  # numpy's answer is NaN beside an infinity
    magnitudes = np.abs(np.concatenate([tensor.numpy().ravel() for tensor in model]))
    found = float(magnitude_quantile(model, q))
    assert found == pytest.approx(np.quantile(magnitudes, q), rel=1e-13, abs=1e-320)
    assert found == pytest.approx(reference.quantile(model, q), rel=1e-13, abs=1e-320)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_quantile_in_single_precision(q):
    model = [torch.randn(64, 32, 3, 3), torch.randn(100, 64) * 0.01, torch.randn(7)]
    magnitudes = torch.cat([tensor.flatten() for tensor in model]).abs()
    assert float(magnitude_quantile(model, q)) == pytest.approx(np.quantile(magnitudes.double(), q), rel=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 1000, 65_000, 130_000])
def test_topk_is_that_of_a_stable_sort(dtype, k):
    model = [torch.randn(64, 64, 4, 4), torch.randn(256, 256)]
    model = [model[0].to(dtype, memory_format=torch.channels_last), model[1].to(dtype)]
    order = torch.cat([tensor.flatten() for tensor in model]).abs().sort(descending=True, stable=True).indices
    expected = torch.zeros(len(order), dtype=torch.bool)
    expected[order[:k]] = True
    assert torch.equal(torch.cat([mask.flatten() for mask in topk_masks(model, k)]), expected)


@pytest.mark.parametrize("k", [0, 1, 17, 143, 144])
def test_equal_weights_go_by_position_in_every_memory_format(k):
    plain = torch.full((4, 2, 3, 3), -0.5)
    model = [plain, plain.contiguous(memory_format=torch.channels_last)]
    kept = torch.cat([mask.flatten() for mask in topk_masks(model, k)])
    assert torch.equal(kept, torch.arange(144) < k)


def test_a_tensor_larger_than_the_chunk():
    large = torch.randn(selection.CHUNK + 3)
    model = [torch.randn(5), large, torch.randn(2, 2), large[: selection.CHUNK // 2]]
    everything = torch.cat([tensor.flatten() for tensor in model]).abs()
    ordered = everything.sort().values
    ranks = [0, 1, len(ordered) // 3, len(ordered) - 1]
    assert torch.equal(order_statistics(model, ranks), ordered[ranks])
    assert sum(int(mask.sum()) for mask in topk_masks(model, 12_345)) == 12_345


@given(models(), st.data())
def test_inputs_are_only_read(model, data):
    before = [tensor.clone() for tensor in model]
    topk_masks(model, data.draw(st.integers(0, count(model))))
    magnitude_quantile(model, 0.5)
    for tensor, copy in zip(model, before, strict=True):
        assert torch.equal(tensor, copy)
        assert torch.equal(tensor.signbit(), copy.signbit())


@given(models([torch.float32]), st.data())
def test_keep_sets_are_nested_and_follow_signs_and_scale(model, data):
    k = data.draw(st.integers(0, count(model) - 1))
    masks = topk_masks(model, k)
    for larger, mask in zip(topk_masks(model, k + 1), masks, strict=True):
        assert torch.equal(larger & mask, mask)
    for flipped, mask in zip(topk_masks([-tensor for tensor in model], k), masks, strict=True):
        assert torch.equal(flipped, mask)
    model = [tensor.clamp(-1e30, 1e30) * (tensor.abs() > 1e-30) for tensor in model]  # where doubling is exact
    for doubled, mask in zip(topk_masks([2 * tensor for tensor in model], k), topk_masks(model, k), strict=True):
        assert torch.equal(doubled, mask)


@pytest.mark.parametrize("nan", [0x7FC00000, 0xFFC00000 - (1 << 32), -1])
def test_nan_counts_as_largest_so_that_it_stays_in_sight(nan):
    bad = torch.tensor([nan], dtype=torch.int32).view(torch.float32)
    model = [torch.tensor([1.0, 3.0]), bad, torch.tensor([2.0, float("inf")])]
    assert order_statistics(model, [0, 3]).tolist() == [1.0, float("inf")]
    assert order_statistics(model, [4]).isnan().all()
    assert [mask.tolist() for mask in topk_masks(model, 2)] == [[False, False], [True], [False, True]]
    assert topk_masks([bad, bad, torch.ones(1)], 1)[0].all()


def test_parameters_are_welcome():
    parameter = torch.nn.Parameter(torch.tensor([3.0, -1.0, 2.0]))
    assert topk_masks([parameter], 2)[0].tolist() == [True, False, True]
    assert float(kth_largest([parameter], 2).detach()) == 2.0


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_beyond_the_elements_is_refused(rank):
    with pytest.raises(ValueError, match=r"Expected argument `ranks` to lie in \[0, 2\], but got"):
        order_statistics([torch.ones(3)], [rank])


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_a_count_beyond_the_elements_is_refused(k):
    with pytest.raises(ValueError, match=rf"Expected argument `k` to lie in \[1, 3\], but got {k}\."):
        kth_largest([torch.ones(3)], k)


@pytest.mark.parametrize("k", [-1, 4])
def test_masks_of_more_than_all_are_refused(k):
    with pytest.raises(ValueError, match=rf"Expected argument `k` to lie in .*, but got {k}\."):
        topk_masks([torch.ones(3)], k)


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_outside_the_unit_interval_is_refused(q):
    with pytest.raises(ValueError, match=r"Expected argument `q` to lie in \[0, 1\], but got"):
        magnitude_quantile([torch.ones(3)], q)


def test_nothing_at_all():
    assert topk_masks([], 0) == []
    assert affordable([], [], 3) == affordable([torch.ones(0)], [1], 3) == 0
    assert topk_masks([torch.ones(0, 3)], 0)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="Expected argument"):
        magnitude_quantile([torch.ones(0)], 0.5)


@given(tensors(), st.data())
def test_largest_among_looks_at_nothing_but_candidates(tensor, data):
    scores = tensor.abs()
    flags = data.draw(st.lists(st.booleans(), min_size=tensor.numel(), max_size=tensor.numel()))
    candidates = torch.tensor(flags, dtype=torch.bool).view(tensor.shape)
    k = data.draw(st.integers(0, sum(flags)))
    found = largest_among(scores, candidates, k).flatten().tolist()
    numbers = reference.numbers(scores)
    order = sorted((i for i, flag in enumerate(flags) if flag), key=lambda i: -numbers[i])
    assert [i for i, kept in enumerate(found) if kept] == sorted(order[:k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_uniform_numbers_of_the_generator(dtype):
    generator = torch.Generator().manual_seed(3)
    first, second = draw(torch.empty(50, 40, dtype=dtype), generator), draw(torch.empty(50, 40), generator)
    assert first.shape == (50, 40)
    assert 0 <= first.min() < 0.01 < 0.99 < first.max() < 1
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(torch.empty(50, 40), torch.Generator().manual_seed(3)))


def test_draws_do_not_depend_on_the_default_dtype():
    expected = [draw(torch.empty(9), torch.Generator().manual_seed(3), normal=normal) for normal in (False, True)]
    torch.set_default_dtype(torch.float64)
    try:
        found = [draw(torch.empty(9), torch.Generator().manual_seed(3), normal=normal) for normal in (False, True)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


def test_normal_draws_have_mean_zero_and_deviation_one():
    numbers = draw(torch.empty(200, 300), torch.Generator().manual_seed(3), normal=True)
    assert abs(float(numbers.mean())) < 0.02
    assert abs(float(numbers.std()) - 1) < 0.02
    assert 3.5 < float(numbers.abs().max()) < 6.0
