"""What reaches the latent weights of the gradient at the sparse ones: dL/dtheta = G(dL/dw)."""

import torch
from torch import Tensor

from lightning_sparse.functional.patterns import Pattern, group_scores, spread_groups
from lightning_sparse.functional.projections import hard_threshold
from lightning_sparse.functional.selection import topk_masks
from lightning_sparse.functional.sharding import elementwise, local

__all__ = ["anneal_gradient", "backward_set", "mask_gradient", "threshold_gradient"]


@elementwise
def mask_gradient(grad: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Keep the gradient of the kept weights only.

    .. math:: \partial L / \partial \theta = m \odot g

    Args:
        grad: Gradient at the sparse weights, any shape.
        mask: Boolean keep set, same shape, True = kept.
        out: Where to write the result; may be ``grad``.

    Returns:
        Tensor like ``grad``.

    Example:
        >>> mask_gradient(torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
        tensor([2., 0.])
    """
    # Not a product: a pruned weight must not hear of an infinite gradient.
    return hard_threshold(grad, mask, out=out)


@elementwise
def anneal_gradient(grad: Tensor, mask: Tensor, alpha: float, *, out: Tensor | None = None) -> Tensor:
    r"""Scale the gradient of the pruned weights.

    .. math:: \partial L / \partial \theta = (m + \alpha (1 - m)) \odot g

    Args:
        grad: Gradient at the sparse weights, any shape.
        mask: Boolean keep set, same shape, True = kept.
        alpha: Factor for pruned weights, in ``[0, 1]``; 1 is the straight-through gradient, 0 the masked one.
        out: Where to write the result; may be ``grad``.

    Returns:
        Tensor like ``grad``.

    References:
        Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023,
        https://arxiv.org/abs/2304.06941.

    Example:
        >>> anneal_gradient(torch.tensor([2.0, -1.0]), torch.tensor([True, False]), 0.25)
        tensor([ 2.0000, -0.2500])
    """
    if alpha == 0.0:
        return mask_gradient(grad, mask, out=out)
    return torch.mul(grad, mask.to(grad.dtype).clamp_(min=alpha), out=out)  # by 1 or alpha


def backward_set(theta: Tensor, mask: Tensor, backward_sparsity: float, pattern: Pattern | None = None) -> Tensor:
    r"""Choose the weights that receive a gradient: the kept ones and the next largest.

    Args:
        theta: Dense latent weights, any shape.
        mask: Boolean keep set, same shape, True = kept.
        backward_sparsity: Fraction of weights without a gradient, in ``[0, 1)``, as far as they are pruned.
        pattern: In which groups they come, if not each by itself.

    Returns:
        Boolean tensor like ``mask``, True = receives a gradient.

    References:
        Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2021, https://arxiv.org/abs/2106.03517.

    Example:
        >>> theta = torch.tensor([4.0, -3.0, 2.0, 1.0])
        >>> backward_set(theta, theta.abs() > 3.5, 0.5)
        tensor([ True,  True, False, False])
    """
    scores = theta if pattern is None else group_scores(theta, pattern)
    kept = topk_masks([scores], scores.numel() - round(backward_sparsity * scores.numel()))[0]
    return (kept if pattern is None else spread_groups(kept, theta, pattern)) | mask


def threshold_gradient(latent_grad: Tensor, theta: Tensor) -> Tensor:
    r"""What the threshold of a soft-thresholded weight hears.

    .. math:: \partial L / \partial \tau = -\sum_i g_i \operatorname{sign}(\theta_i)

    Args:
        latent_grad: Gradient at the latent weights, zero where the threshold is not to hear it.
        theta: Dense latent weights, same shape.

    Returns:
        Scalar; of a sharded weight, the sum over the part on this rank.

    Example:
        >>> threshold_gradient(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        tensor(-1.)
    """
    return -torch.dot(local(latent_grad).flatten(), local(theta).sign().flatten())
