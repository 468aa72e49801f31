"""Weights as powers of their latents: w = sign(theta) |theta|^a."""

import torch
from torch import Tensor

from lightning_sparse.functional.sharding import elementwise

__all__ = ["power_gradient", "signed_power"]


@elementwise
def signed_power(theta: Tensor, exponent: float, *, out: Tensor | None = None) -> Tensor:
    r"""Raise the magnitudes to a power and keep the signs.

    .. math:: w = \operatorname{sign}(\theta)\, |\theta|^a

    Args:
        theta: Any shape.
        exponent: :math:`a > 0`; :math:`1/a` undoes :math:`a`, up to rounding.
        out: Where to write the result; may be ``theta``.

    Returns:
        Tensor like ``theta``.

    Example:
        >>> signed_power(torch.tensor([2.0, -3.0]), 2.0)
        tensor([ 4., -9.])
    """
    return torch.copysign(theta.abs().pow_(exponent), theta, out=out)


@elementwise
def power_gradient(grad: Tensor, theta: Tensor, exponent: float, *, out: Tensor | None = None) -> Tensor:
    r"""Chain rule through :func:`signed_power`.

    .. math:: \partial L / \partial \theta = a\, |\theta|^{a - 1} \odot g

    Args:
        grad: Gradient at the weights, any shape.
        theta: Dense latent weights, same shape.
        exponent: :math:`a \ge 1`.
        out: Where to write the result; may be ``grad``.

    Returns:
        Tensor like ``grad``, zero where ``theta`` is (unless :math:`a = 1`).

    Example:
        >>> power_gradient(torch.tensor([1.0, 1.0]), torch.tensor([2.0, -3.0]), 2.0)
        tensor([4., 6.])
    """
    return torch.mul(grad, theta.abs().pow_(exponent - 1.0).mul_(exponent), out=out)
