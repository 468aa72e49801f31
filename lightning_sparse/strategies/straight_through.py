"""The straight-through baseline: keep the largest weights, train all of them."""

from collections.abc import Callable
from typing import Literal, Unpack

from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining

__all__ = ["StraightThroughMagnitude"]


class StraightThroughMagnitude(SparseTraining):
    r"""The network sees the largest weights only, and all weights hear the gradient as it is.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = \frac{\partial L}{\partial w}

    The mask :math:`m` keeps the largest magnitudes and is taken anew every ``update_every_n_steps`` steps, so that a
    pruned weight returns as soon as it has grown large enough. :class:`ST3` differs in that it shrinks the kept weights
    by the threshold, so that none of them jumps as it comes or goes.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``; by default at once, a fixed budget.
        schedule: Shape of the ramp.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`. With a budget in force from the first step,
            competing by the scale of initialisation (``"global"``) can empty a layer.
        freeze: After which moment the mask stays as it is and only the kept weights train; None for never.
        update_every_n_steps: Optimizer steps between new masks; 1 in the papers.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        With ``distribution="uniform"`` these are discovered neural wirings as their authors apply them to sparse
        training: a fixed budget per layer from the first step on.

    References:
        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
        2013, https://arxiv.org/abs/1308.3432 (straight-through); Wortsman et al., "Discovering Neural Wirings",
        NeurIPS 2019, https://arxiv.org/abs/1906.00586.

    Example:
        >>> StraightThroughMagnitude(sparsity=0.8, distribution="erk").final_sparsity
        0.8
    """

    card = Card(
        paper="Wortsman et al., NeurIPS 2019, https://arxiv.org/abs/1906.00586",
        criterion="the largest, anew at each step",
        gradient="straight-through gradient",
        dense_gradient="always",
        training_flops="2 f_S + f_D",
    )
    exact_on_kept = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0,
        end: int | float = 0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["er", "erk", "global", "lamp", "uniform"] = "uniform",
        freeze: int | float | None = None,
        update_every_n_steps: int = 1,
        **common: Unpack[Patterned],
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=end,
            schedule=schedule,
            distribution=distribution,
            projection="hard",
            gradient="straight_through",
            freeze=freeze,
            update_every_n_steps=update_every_n_steps,
            **common,
        )
