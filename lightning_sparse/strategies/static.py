"""A random mask that stays as it is, the baseline."""

from typing import Literal, Unpack

from lightning_sparse.engine.callback import Budgeted
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse

__all__ = ["StaticSparsity"]


class StaticSparsity(SparseToSparse):
    r"""A random mask that stays as it is.

    .. math:: w = m \odot \theta, \qquad \partial L / \partial \theta = m \odot \partial L / \partial w

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        seed: Of the random numbers.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Example:
        >>> StaticSparsity(sparsity=0.9, distribution="erk").final_sparsity
        0.9
    """

    card = SparseToSparse.card
    keeps_mask = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "erk",
        seed: int = 0,
        **common: Unpack[Budgeted],
    ) -> None:
        super().__init__(sparsity, distribution=distribution, end=0.0, seed=seed, **common)
