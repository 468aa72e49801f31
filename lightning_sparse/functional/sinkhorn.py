"""Soft masks of the largest magnitudes, which can be differentiated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.functional.logistic import logistic
from lightning_sparse.functional.roots import find_root
from lightning_sparse.functional.sharding import elementwise, local, sum_each

__all__ = ["soft_topk", "soft_topk_gradient", "soft_topk_pull", "soft_topk_shift"]


@elementwise
def soft_topk(theta: Tensor, shift: float, sharpness: float) -> Tensor:
    r"""Soft mask of the largest magnitudes.

    .. math:: \tilde m = \varsigma(\beta (|\theta| - \tau))

    with :math:`\varsigma` the sigmoid. For the :math:`\tau` of :func:`soft_topk_shift` it is the solution of
    :math:`\max \langle \tilde m, |\theta| \rangle + H(\tilde m) / \beta` with :math:`\sum \tilde m = K`, to which the
    Sinkhorn iteration converges if all weights cost the same; :math:`H` is the sum of the entropies of
    :math:`\tilde m_i` and :math:`1 - \tilde m_i`.

    Args:
        theta: Dense latent weights, any shape.
        shift: :math:`\tau`.
        sharpness: :math:`\beta > 0`.

    Returns:
        Tensor like ``theta``, in ``[0, 1]``.

    Example:
        >>> soft_topk(torch.tensor([3.0, -1.0, 1.0]), 1.0, 10.0)
        tensor([1.0000, 0.5000, 0.5000])
    """
    return logistic(sharpness * (theta.abs() - shift))


def soft_topk_shift(thetas: Sequence[Tensor], kept: float, sharpness: float, *, near: float = 0.0) -> float:
    r"""Find the :math:`\tau` for which a soft mask keeps as much as wanted.

    .. math:: \sum_i \varsigma(\beta (|\theta_i| - \tau)) = K

    Args:
        thetas: Dense latent weights, of any shape, sharded or not, that share the budget.
        kept: :math:`K`, more than 0 and less than their number.
        sharpness: :math:`\beta > 0`.
        near: A guess.

    Returns:
        :math:`\tau`, the same on every rank.

    References:
        Tai et al., "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS 2022,
        https://arxiv.org/abs/2205.14107.

    Example:
        >>> soft_topk_shift([torch.tensor([3.0, -1.0]), torch.tensor([1.0])], 2, 10.0)
        1.0000
    """

    def surplus(shift: float) -> tuple[float, float]:
        masks = [soft_topk(local(theta).double(), shift, sharpness) for theta in thetas]
        sums = sum_each([mask.sum() for mask in masks], thetas)
        slopes = sum_each([(mask * (1 - mask)).sum() for mask in masks], thetas)
        return float(sums.sum()) - kept, -sharpness * float(slopes.sum())

    return find_root(surplus, near, 1.0 / sharpness, 1e-13 * kept)


def soft_topk_pull(grads: Sequence[Tensor | None], thetas: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    r"""What a budget takes from the gradient of each weight, because what one weight gains the others lose.

    .. math:: C = \frac{\sum_i g_i \theta_i\, \tilde m_i (1 - \tilde m_i)}{\sum_i \tilde m_i (1 - \tilde m_i)}

    Args:
        grads: Gradients :math:`g` at the masked weights, of any shape, sharded or not; None for none.
        thetas: Dense latent weights, of the same shapes.
        masks: What :func:`soft_topk` gives, of the same shapes.

    Returns:
        :math:`C`, the same on every rank; 0 where no mask entry can move.

    Example:
        >>> halves = [torch.tensor([0.5, 0.5])]
        >>> soft_topk_pull([torch.tensor([1.0, 2.0])], [torch.ones(2)], halves)
        1.5
    """
    slopes = [(mask * (1 - mask)).double() for mask in map(local, masks)]
    products = [
        torch.zeros_like(slope).sum() if grad is None else (slope * local(grad) * local(theta)).sum()
        for grad, theta, slope in zip(grads, thetas, slopes, strict=True)
    ]
    whole = float(sum_each([slope.sum() for slope in slopes], thetas).sum())
    return float(sum_each(products, thetas).sum()) / whole if whole else 0.0


@elementwise
def soft_topk_gradient(grad: Tensor, theta: Tensor, mask: Tensor, sharpness: float, pull: float) -> Tensor:
    r"""Chain rule through the product of a weight and its soft mask.

    .. math::
        \frac{\partial L}{\partial\theta} = \tilde m \odot g
        + \beta \operatorname{sign}(\theta)\, \tilde m (1 - \tilde m) \odot (g \odot \theta - C)

    Args:
        grad: Gradient :math:`g` at the masked weights, any shape.
        theta: Dense latent weights, same shape.
        mask: What :func:`soft_topk` gives, same shape.
        sharpness: :math:`\beta`.
        pull: :math:`C` of :func:`soft_topk_pull`.

    Returns:
        Tensor like ``grad``.

    Example:
        >>> half = torch.tensor([0.5])
        >>> soft_topk_gradient(torch.ones(1), torch.ones(1), half, 2.0, 0.0)
        tensor([1.])
    """
    return grad * mask + sharpness * theta.sign() * mask * (1 - mask) * (grad * theta - pull)
