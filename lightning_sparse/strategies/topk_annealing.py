"""Gradient Annealing on a fixed budget."""

from collections.abc import Callable
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.annealing import anneal, annealed_alpha, annealed_density, check_annealing

__all__ = ["TopKGradientAnnealing"]


class TopKGradientAnnealing(SparseTraining):
    r"""Gradient Annealing on a fixed budget: keep the largest weights, let the others hear a fading gradient.

    .. math::
        w = m \odot \theta, \qquad
        \frac{\partial L}{\partial \theta} = (m + \alpha_e (1 - m)) \odot \frac{\partial L}{\partial w}

    The mask :math:`m` keeps the largest magnitudes and is taken anew after every step; :math:`\alpha_e` decays as in
    :class:`AutoSparse`.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``; by default at once, a fixed budget.
        schedule: Shape of the ramp.
        distribution: ``"uniform"``, the same sparsity in each layer, or ``"global"``, where all weights compete. With a
            budget in force from the first step, competing by the scale of initialisation can empty a layer.
        alpha: Initial factor for the gradients of pruned weights, in ``[0, 1]``.
        alpha_reset: When :math:`\alpha` becomes 0: int = epoch, float = fraction of training; None for never.
        backward_sparsity: Fraction of each layer's weights that get no gradient at all, in ``[0, 1)``: the smallest
            ones, as far as they are pruned. None for none.
        update_every_n_steps: Optimizer steps between new masks.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    References:
        Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023,
        https://arxiv.org/abs/2304.06941 (Gradient Annealing for Top-K sparsity).

    Example:
        >>> TopKGradientAnnealing(sparsity=0.8, alpha=0.75).final_sparsity
        0.8
    """

    card = Card(
        paper="Kundu et al., 2023, https://arxiv.org/abs/2304.06941",
        criterion="the largest, anew at each step",
        gradient="pruned weights hear the gradient times an annealed α",
        schedule="fixed budget, to the weight",
        dense_gradient="while α > 0",
        training_flops="2 f_S + f_D while α > 0, then 3 f_S",
        published="ResNet-50 on ImageNet at 80 %: top-1 0.3 % above Top-KAST with Powerpropagation (abstract)",
    )
    exact_on_kept = True

    def __init__(
        self,
        sparsity: float = 0.8,
        *,
        start: int | float = 0,
        end: int | float = 0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["global", "uniform"] = "uniform",
        alpha: float = 0.5,
        alpha_reset: int | float | None = 0.9,
        backward_sparsity: float | None = None,
        update_every_n_steps: int = 1,
        **common: Unpack[Patterned],
    ) -> None:
        check_annealing(alpha, alpha_reset, backward_sparsity)
        super().__init__(
            sparsity,
            start=start,
            end=end,
            schedule=schedule,
            distribution=distribution,
            projection="hard",
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.alpha, self.alpha_reset, self.backward_sparsity = alpha, alpha_reset, backward_sparsity

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Anneal the gradient of the pruned weights."""
        if not latent.state:
            return grad
        alpha = annealed_alpha(self.alpha, self.alpha_reset, context)
        return anneal(grad, latent.theta, latent.mask, alpha, self.backward_sparsity)

    def gradient_density(self, density: float, context: Context) -> float:
        """All of the weight gradient while alpha lasts, then that of the kept weights."""
        return annealed_density(density, annealed_alpha(self.alpha, self.alpha_reset, context), self.backward_sparsity)
