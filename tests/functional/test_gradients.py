"""Gradient rules against autograd of the projections to which they belong."""

import pytest
import torch

from lightning_sparse.functional import (
    anneal_gradient,
    backward_set,
    hard_threshold,
    mask_gradient,
    soft_threshold,
    topk_masks,
)
from tests.reference import functional as reference

INF, NAN = float("inf"), float("nan")


def case(dtype=torch.float64, memory_format=torch.contiguous_format):
    theta = torch.randn(4, 3, 2, 2, dtype=dtype).contiguous(memory_format=memory_format)
    return theta, theta.abs() > 0.7, torch.randn_like(theta)


@pytest.mark.parametrize("project", [lambda t, m: hard_threshold(t, m), lambda t, m: soft_threshold(t, 0.7)])
def test_the_masked_gradient_is_that_of_either_threshold(project):
    theta, mask, grad = case()
    theta.requires_grad_()
    project(theta, mask).backward(grad)
    assert torch.equal(mask_gradient(grad, mask), theta.grad)


def test_a_soft_threshold_pulls_by_the_signs_of_the_kept_weights():
    """dL/dtau = - sum of m g sign(theta), the equation by which thresholds are learned."""
    theta, mask, grad = case()
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    soft_threshold(theta, tau).backward(grad)
    torch.testing.assert_close(tau.grad, -(mask_gradient(grad, mask) * theta.sign()).sum())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_annealing_is_its_equation(alpha, dtype):
    _, mask, grad = case(dtype)
    found = anneal_gradient(grad, mask, alpha)
    torch.testing.assert_close(found, reference.anneal_gradient(grad, mask, alpha))


def test_annealing_lies_between_straight_through_and_masked():
    _, mask, grad = case()
    assert torch.equal(anneal_gradient(grad, mask, 1.0), grad)
    assert torch.equal(anneal_gradient(grad, mask, 0.1), torch.where(mask, grad, 0.1 * grad))
    assert torch.equal(anneal_gradient(grad, mask, 0.0), mask_gradient(grad, mask))
    assert torch.equal(mask_gradient(grad, torch.ones_like(mask)), grad)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_masked_gradient_does_not_hear_what_overflows(value):
    found = mask_gradient(torch.tensor([value, value]), torch.tensor([False, True]))
    assert found[0] == 0.0
    assert not found[1].isfinite()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_of_the_gradient_may_be_reused(alpha, memory_format):
    _, mask, grad = case(torch.float32, memory_format)
    expected = anneal_gradient(grad.clone(), mask, alpha)
    assert anneal_gradient(grad, mask, alpha, out=grad) is grad
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("backward_sparsity", [0.0, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 2.0])
def test_the_backward_set_holds_the_kept_weights_and_the_largest(backward_sparsity, threshold):
    theta = torch.randn(10, 10)
    mask = theta.abs() > threshold
    found = backward_set(theta, mask, backward_sparsity)
    size = 100 - round(100 * backward_sparsity)
    assert found[mask].all()
    assert int(found.sum()) == max(size, int(mask.sum()))
    assert torch.equal(found, topk_masks([theta], max(size, int(mask.sum())))[0])
