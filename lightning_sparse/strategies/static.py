"""A random mask that stays as it is, the baseline."""

from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.callback import Patterned
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse, random_scores

__all__ = ["StaticSparsity"]


class StaticSparsity(SparseToSparse):
    r"""A random mask that stays as it is.

    .. math:: w = m \odot \theta, \qquad \partial L / \partial \theta = m \odot \partial L / \partial w

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        seed: Of the random numbers.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Example:
        >>> StaticSparsity(sparsity=0.9, distribution="erk").final_sparsity
        0.9
    """

    card = SparseToSparse.card
    keeps_mask = True
    serves_patterns = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "erk",
        seed: int = 0,
        **common: Unpack[Patterned],
    ) -> None:
        # The base takes no pattern, as what is dropped and grown later has none.
        super().__init__(sparsity, distribution=distribution, end=0.0, seed=seed, **common)  # type: ignore[misc]

    def _select_one(self, latent: Latent, sparsity: float, context: Context) -> dict[str, Tensor]:
        if self.pattern is None or "mask" in latent.state:
            return super()._select_one(latent, sparsity, context)
        scores = functional.group_scores(random_scores(latent, context), self.pattern)
        (mask,) = functional.topk_masks([scores], self.afford([latent], [scores], sparsity))
        return {"mask": functional.spread_groups(mask, latent.theta, self.pattern)}
