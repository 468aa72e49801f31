"""SET: drop the smallest weights, grow random ones."""

from dataclasses import replace

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse

__all__ = ["SET"]


class SET(SparseToSparse):
    """Sparse evolutionary training: the smallest weights make room for random ones.

    Takes the arguments of :class:`~lightning_sparse.strategies.sparse_to_sparse.SparseToSparse`.

    Note:
        The authors update at the end of each epoch, drop a constant ``drop_fraction=0.3`` and split the budget by
        ``"er"``; the smallest magnitudes of both signs together are dropped here, as in later work. As many as were
        dropped are grown, to the weight; one just dropped may return, and then keeps its value.

    References:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science", 2018, https://arxiv.org/abs/1707.04780.

    Example:
        >>> SET(sparsity=0.9, distribution="er", drop_schedule="constant").drop_fraction
        0.3
    """

    card = replace(
        SparseToSparse.card,
        paper="Mocanu et al., 2018, https://arxiv.org/abs/1707.04780",
        criterion="the smallest make room for random ones",
    )

    def grow_scores(self, latent: Latent, context: Context) -> Tensor:
        """Any weight is as good as any other."""
        return functional.draw(latent.theta, context.generator)
