"""RigL: drop the smallest weights, grow where the gradient is largest."""

from dataclasses import replace

from torch import Tensor

from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse

__all__ = ["RigL"]


class RigL(SparseToSparse):
    r"""The smallest weights make room for those whose gradient is largest.

    An update takes the place of the optimizer's step: with :math:`g = \partial L / \partial w`, dense, the smallest
    magnitudes of each layer are dropped and as many of the others are grown where :math:`|g|` is largest. A weight
    just dropped may return, and then keeps value and momentum; others start from zero.

    Takes the arguments of :class:`~lightning_sparse.strategies.sparse_to_sparse.SparseToSparse`.

    Note:
        As in the authors' code; the paper lets ``drop_fraction`` fall along a cosine until three quarters of the
        training. The authors also update at the very first step, and break ties by noise; here ties go by position.

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, https://arxiv.org/abs/1911.11134;
        code https://github.com/google-research/rigl.

    Example:
        >>> RigL(sparsity=0.9, update_every_n_steps=100).distribution
        'erk'
    """

    card = replace(
        SparseToSparse.card,
        paper="Evci et al., ICML 2020, https://arxiv.org/abs/1911.11134",
        criterion="the smallest make room for those with the largest gradient",
        dense_gradient="at updates, every ΔT steps",
        training_flops="2 f_S + ((ΔT - 1) f_S + f_D) / ΔT",
        published="ResNet-50 on ImageNet, top-1, ERK (uniform): 75.12 (74.60) at 80 %, 73.07 (72.02) at 90 %, and in"
        " five times the training 77.17 (76.71) and 76.42 (75.73) (authors' README)",
    )
    needs_gradient = True
    replaces_step = True

    def grow_scores(self, latent: Latent, context: Context) -> Tensor:
        """Magnitude of the dense gradient."""
        assert latent.grad is not None
        return latent.grad.abs()

    def gradient_density(self, density: float, context: Context) -> float:
        """Sparse, dense where an update reads it."""
        return 1.0 if self.is_due(context) else density
