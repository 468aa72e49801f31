"""Sparse variational dropout: weights that are mostly noise are pruned."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["SparseVariationalDropout"]


class SparseVariationalDropout(SparseTraining):
    r"""Learn how much noise each weight bears; those that bear much are pruned.

    .. math::
        w = \theta + \sigma \epsilon \text{ in training}, \qquad w = \theta\, [\log\alpha < 3] \text{ else}, \qquad
        \log\alpha = \log\sigma^2 - \log\theta^2 \in [-b, b],

    with normal noise :math:`\epsilon`, drawn anew for every optimizer step. To the loss comes :math:`\lambda
    \mathrm{KL}`, the divergence of the noisy weights from a log-uniform prior, which falls as :math:`\alpha` grows.
    What that asks of :math:`\theta` and :math:`\log\sigma^2`: see :func:`~lightning_sparse.functional.noise_gradient`.
    An Adam of the callback's own steps :math:`\log\sigma^2`.

    Args:
        kl_weight: Final :math:`\lambda`. For a loss that is a mean over samples, the evidence lower bound asks for 1
            divided by the number of training samples, whatever the batch size; the default is that for CIFAR.
        start: When :math:`\lambda` starts to grow from zero: int = epoch, float = fraction of training.
        end: When it reaches ``kl_weight``; in between it grows linearly.
        threshold: Weights with at least this :math:`\log\alpha` are pruned.
        log_variance_init: Initial :math:`\log\sigma^2`.
        log_variance_lr: Learning rate of :math:`\log\sigma^2`; None for that of the parameter group in which the
            weight lives, which suits Adam but no SGD.
        bound: :math:`b`. Where :math:`\log\alpha` reaches it, neither is pulled any further.
        seed: Of the noise.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Sparsity is an outcome here, not a target. The noise is in the weights, one sample for a whole step, as in the
        paper's equation (9). The authors' code draws it for each activation of each sample of a batch (local
        reparametrisation), which has the same mean and variance there but a gradient of much smaller variance; that
        takes layers of its own. Here small learning rates and large batches do. The defaults are those of the authors'
        200 epochs, with Adam's learning rate falling linearly from 1e-3 to 0. Weight decay on :math:`\theta` takes the
        place of none of this: set it to 0. Training FLOPs are counted as dense.

    References:
        Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017,
        https://arxiv.org/abs/1701.05369; code https://github.com/senya-ashukha/variational-dropout-sparsifies-dnn.

    Example:
        >>> SparseVariationalDropout(kl_weight=1 / 60_000).final_sparsity is None
        True
    """

    card = Card(
        paper="Molchanov et al., ICML 2017, https://arxiv.org/abs/1701.05369",
        criterion="those that are larger than the noise which they learn to bear",
        projection="mask; while it trains all weights, with noise",
        gradient="straight-through, and that of a divergence from the prior",
        schedule="an outcome of the divergence",
        allocation="learned",
        dense_gradient="always",
        training_flops="3 f_D",
    )
    stochastic = True
    serves_patterns = False
    learner = "adam"

    def __init__(
        self,
        *,
        kl_weight: float = 2e-5,
        start: int | float = 0.025,
        end: int | float = 0.1,
        threshold: float = 3.0,
        log_variance_init: float = -10.0,
        log_variance_lr: float | None = None,
        bound: float = 8.0,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        check_number("kl_weight", kl_weight, negative=False)
        check_number("log_variance_init", log_variance_init)
        if log_variance_lr is not None:
            check_number("log_variance_lr", log_variance_lr, negative=False)
        check_number("threshold", threshold)
        check_number("bound", bound)
        if not threshold < bound:
            raise ValueError(f"Expected argument `bound` to be more than `threshold` = {threshold}, but got {bound!r}.")
        super().__init__(None, start=start, end=end, **common)
        self.kl_weight, self.log_alpha_threshold, self.bound, self.seed = kl_weight, threshold, bound, seed
        self.log_variance_init, self.log_variance_lr = log_variance_init, log_variance_lr

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep the logarithm of the variance of each weight."""
        dtype = torch.promote_types(theta.dtype, torch.float32)
        init = torch.full_like(theta, self.log_variance_init, dtype=dtype)
        return {"log_variance": init.requires_grad_()}

    def learning_rate(self, group: Mapping[str, Any], context: Context) -> float:
        """Of the variances."""
        return super().learning_rate(group, context) if self.log_variance_lr is None else self.log_variance_lr

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Keep the weights that are larger than their noise."""
        states = ((latent.theta, latent.state["log_variance"].detach()) for latent in latents)
        rates = (functional.log_alpha(theta, variance, self.bound) for theta, variance in states)
        return [{"mask": (rate >= self.log_alpha_threshold).logical_not_()} for rate in rates]  # NaN stays in sight

    def sample(self, latent: Latent) -> Tensor:
        """The noise of this step."""
        uniform = functional.draw(latent.theta, latent.noise)
        return functional.normal(uniform.to(latent.state["log_variance"].dtype))

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Add noise while a batch is trained on, and prune at every other time."""
        if not context.training:
            super().project(latent, context, out)
            return
        variance = latent.state["log_variance"].detach()
        out.copy_(functional.add_noise(latent.theta, variance, self.sample(latent), self.bound))

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Chain rule through noise and divergence; the gradient of the variance is left in its ``.grad``."""
        variance, weight = latent.state["log_variance"], self.kl_weight * context.progress
        noise = self.sample(latent) if context.training else torch.zeros_like(variance)
        args = latent.theta, variance.detach(), noise, self.bound, weight
        variance.grad = functional.noise_gradient(grad, *args, mean=False).to(variance.dtype)
        return functional.noise_gradient(grad, *args, mean=True).to(grad.dtype)
