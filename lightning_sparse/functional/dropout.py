"""Variational dropout: weights with Gaussian noise, and what it costs to be certain of them."""

import torch
from torch import Tensor

from lightning_sparse.functional.logistic import logistic
from lightning_sparse.functional.sharding import elementwise

__all__ = ["add_noise", "log_alpha", "noise_gradient", "normal"]

# Constants of the approximation, Molchanov et al., equation (14).
K1, K2, K3 = 0.63576, 1.8732, 1.48695


@elementwise
def normal(uniform: Tensor) -> Tensor:
    """Turn uniform numbers into standard normal ones.

    Args:
        uniform: Numbers in ``[0, 1)``, such as :func:`~lightning_sparse.functional.draw` draws, any shape.

    Returns:
        Tensor like ``uniform``, finite.

    Example:
        >>> normal(torch.tensor([0.0, 0.5, 0.975]))
        tensor([-5.4201,  0.0000,  1.9600])
    """
    # Their grid is 2^-24 wide, and its first number is 0.
    noise: Tensor = torch.special.ndtri(uniform.clamp(min=2.0**-25))
    return noise


@elementwise
def log_alpha(theta: Tensor, log_variance: Tensor, bound: float = 8.0) -> Tensor:
    r"""Logarithm of the dropout rate: the variance of a weight in relation to its square.

    .. math:: \log\alpha = \log\sigma^2 - \log\theta^2, \quad \text{clipped to } \pm b

    Args:
        theta: Means, any shape.
        log_variance: :math:`\log\sigma^2`, same shape.
        bound: :math:`b > 0`.

    Returns:
        Tensor like ``log_variance``.

    Example:
        >>> log_alpha(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, -2.0]))
        tensor([-2.,  8.])
    """
    return (log_variance - 2 * theta.to(log_variance.dtype).abs().log()).clamp_(-bound, bound)


@elementwise
def add_noise(theta: Tensor, log_variance: Tensor, noise: Tensor, bound: float = 8.0) -> Tensor:
    r"""Weights with noise.

    .. math:: w = \theta + \sigma \epsilon, \qquad \sigma^2 \in [e^{-b} \theta^2, e^b \theta^2]

    Args:
        theta: Means, any shape.
        log_variance: :math:`\log\sigma^2`, same shape.
        noise: :math:`\epsilon`, same shape.
        bound: :math:`b`, see :func:`log_alpha`.

    Returns:
        Tensor like ``log_variance``.

    Example:
        >>> add_noise(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, -2.0]), torch.ones(2))
        tensor([1.3679, 0.0000])
    """
    log_square = 2 * theta.to(log_variance.dtype).abs().log()
    clipped = torch.minimum(torch.maximum(log_variance, log_square - bound), log_square + bound)
    return theta + noise * (0.5 * clipped).exp()


@elementwise
def noise_gradient(
    grad: Tensor, theta: Tensor, log_variance: Tensor, noise: Tensor, bound: float, kl_weight: float, *, mean: bool
) -> Tensor:
    r"""Chain rule through :func:`add_noise`, and the gradient of the divergence from the log-uniform prior.

    .. math::
        \mathrm{KL} \approx -k_1\, \varsigma(k_2 + k_3 \log\alpha) + \tfrac12 \log(1 + \alpha^{-1}) + k_1

    with :math:`\varsigma` the sigmoid; it falls from infinity to zero as :math:`\alpha` grows. Where
    :math:`\log\alpha` is not clipped,

    .. math::
        \frac{\partial L}{\partial\theta} = g - \frac{2 \lambda}{\theta} \mathrm{KL}'(\log\alpha), \qquad
        \frac{\partial L}{\partial\log\sigma^2} = \tfrac12\, \sigma\epsilon g + \lambda \mathrm{KL}'(\log\alpha);

    where it is, :math:`g + \epsilon g\, e^{\pm b / 2} \operatorname{sign}\theta` and zero.

    Args:
        grad: Gradient :math:`g` at the noisy weights, any shape.
        theta: Means, same shape.
        log_variance: :math:`\log\sigma^2`, same shape.
        noise: :math:`\epsilon`, same shape; may be zero.
        bound: :math:`b`, see :func:`log_alpha`.
        kl_weight: :math:`\lambda \ge 0`.
        mean: Which of the two: that of the mean, or of the logarithm of the variance.

    Returns:
        Tensor like ``log_variance``.

    References:
        Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017, equation (14),
        https://arxiv.org/abs/1701.05369.

    Example:
        >>> one = torch.ones(1)
        >>> noise_gradient(one, one, -2 * one, one, 8.0, 0.0, mean=True)
        tensor([1.])
        >>> noise_gradient(one, one, -2 * one, one, 8.0, 0.0, mean=False)
        tensor([0.1839])
    """
    rate = log_alpha(theta, log_variance, bound)
    inside, ratio = rate.abs() < bound, noise * (0.5 * rate).exp()  # noise in units of the mean
    sigmoid = logistic(K2 + K3 * rate)
    slope = -kl_weight * (K1 * K3 * sigmoid * (1 - sigmoid) + 0.5 * logistic(-rate))
    if mean:
        return grad + torch.where(inside, -2 * slope / theta, grad * ratio * theta.sign())
    return torch.where(inside, 0.5 * grad * ratio * theta.abs() + slope, 0.0)
