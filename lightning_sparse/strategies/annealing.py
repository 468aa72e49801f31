"""Gradient Annealing: pruned weights hear a gradient that fades over the training."""

import math

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.checks import check_fraction, check_moment
from lightning_sparse.engine.latent import Context
from lightning_sparse.schedules import sigmoid_cosine_decay

__all__ = ["anneal", "annealed_alpha", "annealed_density", "check_annealing"]


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
