"""GMP: gradual magnitude pruning, the baseline."""

from collections.abc import Callable
from typing import Literal, Unpack

from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining

__all__ = ["GMP"]


class GMP(SparseTraining):
    r"""Prune the smallest weights step by step along a cubic ramp, then train what is left.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    The mask :math:`m` keeps the largest magnitudes. It is taken anew every ``update_every_n_steps`` steps from
    ``start`` to ``end`` and then stays. Pruned weights are set to zero and do not come back.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        initial_sparsity: Sparsity before ``start``, in ``[0, 1)``.
        schedule: Shape of the ramp; cubic in the paper.
        distribution: ``"uniform"``, the same sparsity in each layer, as in the paper, or another split, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        update_every_n_steps: Optimizer steps between new masks; 100 to 1000 in the paper.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Masks are updated at the multiples of ``update_every_n_steps`` and once more at ``end``, so that the target is
        reached exactly; several published ports stop one update short of it.

    References:
        Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
        https://arxiv.org/abs/1710.01878.

    Example:
        >>> GMP(sparsity=0.8, update_every_n_steps=200).final_sparsity
        0.8
    """

    card = Card(
        paper="Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878",
        criterion="the largest, less and less",
    )
    keeps_latent = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0.2,
        end: int | float = 0.8,
        initial_sparsity: float = 0.0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["er", "erk", "global", "lamp", "uniform"] = "uniform",
        update_every_n_steps: int = 100,
        **common: Unpack[Patterned],
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=end,
            initial_sparsity=initial_sparsity,
            schedule=schedule,
            distribution=distribution,
            projection="hard",
            gradient="masked",
            freeze=end,
            update_every_n_steps=update_every_n_steps,
            **common,
        )
