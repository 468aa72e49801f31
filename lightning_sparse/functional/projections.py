"""What the network sees of the latent weights: w = P(theta)."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.sharding import elementwise, local, ranks_of, sum_over

__all__ = ["channel_scale", "exceeds", "hard_threshold", "rescaled_soft_threshold", "soft_threshold"]


@elementwise
def exceeds(theta: Tensor, threshold: Tensor | float) -> Tensor:
    r"""The weights that a threshold keeps.

    .. math:: m = [\,|\theta| > \tau\,]

    Args:
        theta: Dense latent weights, any shape.
        threshold: Number or scalar tensor :math:`\tau`.

    Returns:
        Boolean tensor like ``theta``, True = kept; NaN is kept, so that it stays in sight.

    Example:
        >>> exceeds(torch.tensor([2.0, -1.0]), 1.0)
        tensor([ True, False])
    """
    # Not `>`, which would prune a NaN and so hide it.
    return (theta.abs() <= threshold).logical_not_()


@elementwise
def hard_threshold(theta: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Zero the pruned entries.

    .. math:: w = m \odot \theta

    Args:
        theta: Dense latent weights, any shape.
        mask: Boolean keep set, same shape, True = kept.
        out: Where to write the result; may be ``theta``.

    Returns:
        Tensor like ``theta``.

    Example:
        >>> hard_threshold(torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
        tensor([2., 0.])
    """
    # Not a product: 0 * inf is NaN and 0 * -1 is -0.
    if not theta.is_cpu or (theta.requires_grad and torch.is_grad_enabled()):
        return torch.where(mask, theta, torch.zeros((), dtype=theta.dtype, device=theta.device), out=out)
    # To choose by a mask without pattern is slow on CPUs, which mispredict the branches; to mask bits is not.
    out = torch.empty_like(theta) if out is None else out
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[theta.element_size()]
    torch.bitwise_and(theta.view(integer), mask.view(torch.int8).neg().to(integer), out=out.view(integer))
    return out


@elementwise
def soft_threshold(theta: Tensor, threshold: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    r"""Shrink every magnitude by the threshold, to zero at least.

    .. math:: w = \operatorname{sign}(\theta) \max(|\theta| - \tau, 0)

    Args:
        theta: Dense latent weights, any shape.
        threshold: Non-negative number or scalar tensor :math:`\tau`.
        out: Where to write the result; must not share memory with ``theta``.

    Returns:
        Tensor like ``theta``. Entries with :math:`|\theta| \le \tau` are exactly zero.

    Example:
        >>> soft_threshold(torch.tensor([2.0, -1.0, 0.25]), 0.5)
        tensor([ 1.5000, -0.5000,  0.0000])
    """
    threshold = torch.as_tensor(threshold, dtype=theta.dtype, device=theta.device)
    # A number is faster than a tensor, where reading it does not wait for a device.
    bound: Any = threshold.item() if threshold.is_cpu and not threshold.requires_grad else threshold
    # theta minus its clamp: two passes, and x - x = +0 for every pruned entry.
    clamped = torch.clamp(theta, -bound, bound, out=out)
    return torch.sub(theta, clamped, out=out)


def channel_scale(theta: Tensor, threshold: Tensor | float, *, scratch: Tensor | None = None) -> Tensor:
    r"""The factor that gives every output channel back the magnitude that its pruned weights took away.

    .. math::
        r_o = \frac{\operatorname{mean}_{i \in o}(|\theta_i|\, m_i) + 10^{-6}}
                   {\operatorname{mean}_{i \in o}|\theta_i| + 10^{-6}},
        \qquad c_o = \frac{1.01}{r_o + 0.01},
        \qquad m_i = [\,|\theta_i| > \tau\,]

    The means run over all dimensions but the first, over the raw magnitudes of the latent weights.

    Args:
        theta: Dense latent weights, shape ``(out, *)``.
        threshold: Number or scalar tensor :math:`\tau`; or :math:`m` itself, bool, of the shape of ``theta``.
        scratch: Tensor like ``theta`` that may be overwritten, to save an allocation.

    Returns:
        :math:`c`, shape ``(out, 1, ...)``, one where nothing is pruned; of a sharded weight, for the channels that lie
        on this rank.

    References:
        Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you need for
        Sparse Training?", WACV 2023, https://arxiv.org/abs/2212.01076; constants from the authors' code.

    Example:
        >>> theta = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
        >>> channel_scale(theta, 1.0)
        tensor([[1.3289],
                [1.0000]])
    """
    magnitude = torch.abs(local(theta), out=None if scratch is None else local(scratch))
    magnitude = magnitude if theta.ndim > 1 else magnitude.unsqueeze(1)  # a vector has one element per channel
    dims = tuple(range(1, magnitude.ndim))
    dtype = torch.promote_types(theta.dtype, torch.float32)  # a sum may be too large for half precision
    dense = magnitude.sum(dims, keepdim=True, dtype=dtype)
    if isinstance(threshold, Tensor) and threshold.dtype == torch.bool:
        hard_threshold(magnitude, local(threshold).view_as(magnitude), out=magnitude)
    else:
        torch.threshold_(magnitude, float(threshold), 0.0)
    kept = magnitude.sum(dims, keepdim=True, dtype=dtype)
    means = sum_over(ranks_of(theta, dims), torch.stack([kept, dense])) / math.prod(theta.shape[1:])
    kept, dense = (means + 1e-6).view(2, -1, *[1] * (theta.ndim - 1))
    scale: Tensor = 1.01 / (kept / dense + 0.01)
    return scale.to(theta.dtype)


def rescaled_soft_threshold(theta: Tensor, threshold: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    r"""Soft-threshold, then give every output channel its magnitude back.

    .. math:: w = c_o \operatorname{sign}(\theta) \max(|\theta| - \tau, 0)

    with :math:`c_o` from :func:`channel_scale`.

    Args:
        theta: Dense latent weights, shape ``(out, *)``.
        threshold: Non-negative number or scalar tensor :math:`\tau`.
        out: Where to write the result; must not share memory with ``theta``.

    Returns:
        Tensor like ``theta``.

    Example:
        >>> rescaled_soft_threshold(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 1.0)
        tensor([[2.6579, 0.0000],
                [1.0000, 1.0000]])
    """
    out = torch.empty_like(theta) if out is None else out
    scale = channel_scale(theta, threshold, scratch=out)
    soft_threshold(theta, threshold, out=out)
    local(out).mul_(scale)
    return out
