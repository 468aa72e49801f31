"""Scores by which weights compete across layers."""

import torch
from torch import Tensor

from lightning_sparse.functional.sharding import spread, whole

__all__ = ["lamp_scores"]


def lamp_scores(theta: Tensor) -> Tensor:
    r"""Share of each weight in the sum of the squares of its layer's weights that are no smaller.

    .. math:: s_i = \theta_i^2 \Big/ \sum_{j:\, |\theta_j| \ge |\theta_i|} \theta_j^2

    Of equal magnitudes the earlier one counts as larger.

    Args:
        theta: Weights of one layer, any shape; sharded ones are gathered on every rank, all of which must enter.

    Returns:
        Tensor like ``theta``, float64, in ``[0, 1]``: 1 for the largest weight, 0 for zeros.

    References:
        Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021,
        https://arxiv.org/abs/2010.07611.

    Example:
        >>> lamp_scores(torch.tensor([3.0, -1.0, 0.0]))
        tensor([1.0000, 0.1000, 0.0000], dtype=torch.float64)
    """
    squares, order = whole(theta.detach()).flatten().double().square().sort(descending=True, stable=True)
    tails = squares.cumsum(0).clamp_min_(torch.finfo(squares.dtype).tiny)  # of a layer of zeros
    scores = torch.empty_like(squares).scatter_(0, order, squares / tails)
    return spread(scores.view(theta.shape), theta)
