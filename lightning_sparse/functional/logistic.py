"""The logistic function, the same wherever a number lies."""

from torch import Tensor

__all__ = ["logistic"]


def logistic(x: Tensor) -> Tensor:
    r"""The logistic function, rounded alike on every rank.

    .. math:: \varsigma(x) = \frac{1}{1 + e^{-x}}

    Args:
        x: Any shape.

    Returns:
        Tensor like ``x``.

    Example:
        >>> import torch
        >>> logistic(torch.tensor([-1000.0, 0.0, 1000.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    # On CPUs `torch.sigmoid` rounds the last few numbers of a tensor otherwise, and shards end elsewhere.
    return (-x).exp_().add_(1).reciprocal_()
