"""AutoSparse: learned thresholds with Gradient Annealing."""

import math
from typing import Unpack

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common
from lightning_sparse.engine.checks import check_fraction, check_moment
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.schedules import sigmoid_cosine_decay
from lightning_sparse.strategies.str import STR

__all__ = ["AutoSparse"]


def check_annealing(alpha: float, alpha_reset: int | float | None, backward_sparsity: float | None) -> None:
    """Refuse settings of Gradient Annealing that are out of range."""
    check_fraction("alpha", alpha, one=True)
    if alpha_reset is not None:
        check_moment("alpha_reset", alpha_reset)
    if backward_sparsity is not None:
        check_fraction("backward_sparsity", backward_sparsity)


def annealed_alpha(alpha: float, alpha_reset: int | float | None, context: Context) -> float:
    """Factor for the gradients of pruned weights, constant within an epoch: the decay at epoch / epochs, then 0."""
    if math.isinf(context.epochs):
        raise MisconfigurationException(
            "Gradient Annealing decays `alpha` over the whole training, but training is open-ended."
            " Set `max_epochs` or `max_steps` in the Trainer."
        )
    # Rounded, so that 0.55 * 100 epochs is epoch 55.
    reset = round(alpha_reset * context.epochs, 9) if isinstance(alpha_reset, float) else alpha_reset
    if reset is not None and context.epoch >= reset:
        return 0.0
    return alpha * sigmoid_cosine_decay(min(1.0, context.epoch / context.epochs))


def anneal(grad: Tensor, theta: Tensor, mask: Tensor, alpha: float, backward_sparsity: float | None) -> Tensor:
    """Scale the gradient of the pruned weights, in place, and drop it outside the backward set."""
    grad = functional.anneal_gradient(grad, mask, alpha, out=grad)
    if backward_sparsity is not None and alpha > 0.0:
        functional.mask_gradient(grad, functional.backward_set(theta, mask, backward_sparsity), out=grad)
    return grad


def annealed_density(density: float, alpha: float, backward_sparsity: float | None) -> float:
    """Fraction of the weight gradient that Gradient Annealing has to compute."""
    return density if alpha == 0.0 else max(density, 1.0 - (backward_sparsity or 0.0))


class AutoSparse(STR):
    r"""Learned thresholds whose pruned weights keep hearing a fading gradient.

    .. math::
        w = \operatorname{sign}(\theta) \max(|\theta| - \sigma(s), 0), \qquad
        \frac{\partial L}{\partial \theta} = D \odot g, \qquad
        \frac{\partial L}{\partial s} = -\sigma'(s) \sum_i D_i\, g_i \operatorname{sign}(\theta_i)

    with :math:`g = \partial L / \partial w` and :math:`D_i = 1` for kept weights, :math:`\alpha_e` for pruned ones. In
    epoch :math:`e` of :math:`E`, :math:`\alpha_e = \alpha\, \mathrm{decay}(e / E)`
    (:func:`~lightning_sparse.schedules.sigmoid_cosine_decay`), and 0 from ``alpha_reset`` on.

    Args:
        alpha: Initial factor :math:`\alpha` for the gradients of pruned weights, in ``[0, 1]``; 0 gives :class:`STR`.
            Larger values let more weights return: higher accuracy, lower sparsity.
        threshold_init: Initial :math:`s`; one learned scalar per layer.
        threshold_weight_decay: L2 penalty on :math:`s`.
        alpha_reset: When :math:`\alpha` becomes 0: int = epoch, float = fraction of training; None for never.
        alpha_in_threshold: Whether :math:`\alpha` enters the gradient of :math:`s`, as the chain rule has it, or kept
            weights alone decide.
        backward_sparsity: Fraction of each layer's weights that get no gradient at all, in ``[0, 1)``: the smallest
            ones, as far as they are pruned. None for none.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Sparsity is an outcome here, not a target. There is no code by the authors; where the paper leaves a choice, the
        equations above are the choice. How the thresholds are stepped: see :class:`STR`.

    References:
        Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023,
        https://arxiv.org/abs/2304.06941.

    Example:
        >>> AutoSparse(alpha=0.75, alpha_reset=90).alpha
        0.75
    """

    card = Card(
        paper="Kundu et al., 2023, https://arxiv.org/abs/2304.06941",
        criterion="magnitudes above a threshold learned per layer",
        projection="soft threshold",
        gradient="pruned weights hear the gradient times an annealed α",
        schedule="learned",
        allocation="learned",
        dense_gradient="while α > 0",
        training_flops="2 f_S + f_D while α > 0, then 3 f_S",
        published="ResNet-50 on ImageNet at 80 %: half the training FLOPs, a seventh of the inference FLOPs (abstract)",
    )

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        threshold_init: float = -5.0,
        threshold_weight_decay: float = 0.0,
        alpha_reset: int | float | None = 0.9,
        alpha_in_threshold: bool = True,
        backward_sparsity: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        check_annealing(alpha, alpha_reset, backward_sparsity)
        super().__init__(threshold_init=threshold_init, threshold_weight_decay=threshold_weight_decay, **common)
        self.alpha, self.alpha_reset = alpha, alpha_reset
        self.alpha_in_threshold, self.backward_sparsity = alpha_in_threshold, backward_sparsity

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Anneal the gradient of the pruned weights, and leave that of ``s`` in its ``.grad``."""
        mask, alpha = latent.mask, annealed_alpha(self.alpha, self.alpha_reset, context)
        latent_grad = anneal(grad, latent.theta, mask, alpha, self.backward_sparsity)
        heard = latent_grad if self.alpha_in_threshold else functional.mask_gradient(latent_grad, mask)
        self.learn_threshold(latent, heard)
        return latent_grad

    def gradient_density(self, density: float, context: Context) -> float:
        """All of the weight gradient while alpha lasts, then that of the kept weights."""
        return annealed_density(density, annealed_alpha(self.alpha, self.alpha_reset, context), self.backward_sparsity)
