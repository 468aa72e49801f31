"""Masks that are drawn: each weight is kept with a probability of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.functional.logistic import logistic
from lightning_sparse.functional.measures import count_nonzeros
from lightning_sparse.functional.roots import find_root
from lightning_sparse.functional.selection import kth_largest, topk_masks
from lightning_sparse.functional.sharding import elementwise, like, local, sum_each

__all__ = ["budget_shift", "likeliest_masks", "relaxed_mask", "relaxed_mask_gradient"]

# Of the authors' code: keeps logarithms of 0 finite.
EPS = 1e-20


@elementwise
def relaxed_mask(probability: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    r"""Draw a mask from a Bernoulli distribution that is smoothed, so that it can be differentiated.

    .. math::
        \tilde m = \varsigma\Big(T \Big(\log\frac{p}{1 - p} + n\Big)\Big), \qquad n = \log\frac{u}{1 - u}

    with :math:`\varsigma` the sigmoid. The noise :math:`n` is distributed as the difference of two Gumbel variables.

    Args:
        probability: :math:`p`, in ``[0, 1]``, any shape.
        uniform: :math:`u`, in ``[0, 1)``, same shape, such as :func:`~lightning_sparse.functional.draw` draws.
        temperature: :math:`T > 0`; the larger, the nearer to zero and one.

    Returns:
        Tensor like ``probability``, in ``[0, 1]``.

    Example:
        >>> relaxed_mask(torch.tensor([0.5, 1.0, 0.0]), torch.full((3,), 0.75), 2.0)
        tensor([0.9000, 1.0000, 0.0000])
    """
    # Of numbers on a grid 2^-24 wide, of which the first is 0; 1 is none of them.
    uniform = uniform.clamp(2.0**-25, 1 - 2.0**-24).to(probability.dtype)
    logit = (probability + EPS).log() - (1 - probability + EPS).log()
    return logistic(uniform.logit_().add_(logit).mul_(temperature))


@elementwise
def relaxed_mask_gradient(grad: Tensor, mask: Tensor, probability: Tensor, temperature: float) -> Tensor:
    r"""Chain rule through :func:`relaxed_mask`.

    .. math::
        \frac{\partial L}{\partial p} = T\, \tilde m (1 - \tilde m) \Big(\frac1p + \frac{1}{1 - p}\Big)
        \frac{\partial L}{\partial \tilde m}

    Args:
        grad: Gradient at the mask, any shape.
        mask: What :func:`relaxed_mask` has drawn, same shape.
        probability: :math:`p`, same shape.
        temperature: :math:`T`.

    Returns:
        Tensor like ``mask``.

    Example:
        >>> p, m = torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0])
        >>> relaxed_mask_gradient(torch.ones(2), m, p, 2.0)
        tensor([2., 0.])
    """
    slope = (1 / (probability + EPS) + 1 / (1 - probability + EPS)).mul_(mask).mul_(1 - mask)
    return slope.mul_(temperature).mul_(grad)


def budget_shift(probabilities: Sequence[Tensor], kept: int) -> float:
    r"""By how much probabilities must fall so that they keep a given number of weights on average.

    .. math:: v \ge 0: \quad \sum_i \min(\max(p_i - v, 0), 1) = K

    Clipping :math:`p - v` to ``[0, 1]`` is the Euclidean projection onto what respects the budget :math:`K`.

    Args:
        probabilities: :math:`p`, of any shape, sharded or not; may leave ``[0, 1]``.
        kept: :math:`K`.

    Returns:
        :math:`v`; 0 if the budget is respected already.

    References:
        Zhou et al., "Effective Sparsification of Neural Networks with Global Sparsity Constraint", CVPR 2021,
        theorem 1, https://arxiv.org/abs/2105.01571.

    Example:
        >>> budget_shift([torch.tensor([0.75, 0.75]), torch.tensor([0.25])], 1)
        0.25
    """

    def surplus(shift: float) -> tuple[float, float]:
        moved = [local(p).double() - shift for p in probabilities]
        sums = sum_each([p.clamp(0.0, 1.0).sum() for p in moved], probabilities)
        # Of what moves if the shift grows.
        moving = sum_each([((p > 0.0) & (p <= 1.0)).count_nonzero() for p in moved], probabilities)
        return float(sums.sum()) - kept, -float(moving.sum())

    return find_root(surplus, 0.0, 0.01, 1e-13 * kept) if surplus(0.0)[0] > 0.0 else 0.0


def likeliest_masks(probabilities: Sequence[Tensor], thetas: Sequence[Tensor], kept: int) -> list[Tensor]:
    """The most probable of all masks that keep a given number of weights: that of the largest probabilities.

    Args:
        probabilities: In ``[0, 1]``, of any shape, sharded or not.
        thetas: Weights, of the same shapes. Among equal probabilities the largest magnitudes are kept.
        kept: Number of weights to keep, ``0`` to ``N``.

    Returns:
        One boolean mask per tensor, True = kept, with exactly ``kept`` True entries in all.

    Example:
        >>> likeliest_masks([torch.tensor([0.9, 0.5, 0.5])], [torch.tensor([0.1, 1.0, -2.0])], 2)
        [tensor([ True, False,  True])]
    """
    if not kept:
        return [torch.zeros_like(p, dtype=torch.bool) for p in probabilities]
    bound = float(kth_largest(probabilities, kept))
    above = [p > bound for p in probabilities]
    left = kept - int(count_nonzeros(above).sum())
    pairs = zip(probabilities, thetas, strict=True)
    ties = [like(torch.where(local(p) == bound, local(theta).abs(), -1.0), theta) for p, theta in pairs]
    return [one | other for one, other in zip(above, topk_masks(ties, left, signed=True), strict=True)]
