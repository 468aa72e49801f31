"""LAMP: magnitudes that compete across layers by their share of what is left."""

from collections.abc import Callable
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Budgeted, SparseTraining
from lightning_sparse.engine.latent import Latent

__all__ = ["LAMP"]


class LAMP(SparseTraining):
    r"""Prune the smallest layer-adaptive scores step by step along a cubic ramp, then train what is left.

    .. math::
        w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}, \qquad
        s_i = \theta_i^2 \Big/ \sum_{j:\, |\theta_j| \ge |\theta_i|} \theta_j^2

    The sum runs over the layer of the weight. The mask :math:`m` keeps the largest scores :math:`s` over all layers
    (:func:`~lightning_sparse.functional.lamp_scores`), within a layer thus the largest magnitudes, and of each layer at
    least one. It is taken anew every ``update_every_n_steps`` steps from ``start`` to ``end`` and then stays. Pruned
    weights are set to zero and do not come back.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        initial_sparsity: Sparsity before ``start``, in ``[0, 1)``.
        schedule: Shape of the ramp.
        update_every_n_steps: Optimizer steps between new masks. Each new mask sorts every layer.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        The authors prune a trained network, in one go or in rounds with retraining in between; here the same scores
        drive a gradual ramp. They add up in single precision and let ties fall as they come; here in double precision,
        with ties by position.

    References:
        Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021,
        https://arxiv.org/abs/2010.07611; code https://github.com/jaeho-lee/layer-adaptive-sparsity.

    Example:
        >>> LAMP(sparsity=0.8, update_every_n_steps=200).final_sparsity
        0.8
    """

    card = Card(
        paper="Lee et al., ICLR 2021, https://arxiv.org/abs/2010.07611",
        criterion="the largest by their share in the rest of their layer",
        allocation="scores of all layers compete",
    )
    keeps_latent = False
    serves_patterns = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0.2,
        end: int | float = 0.8,
        initial_sparsity: float = 0.0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        update_every_n_steps: int = 100,
        **common: Unpack[Budgeted],
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=end,
            initial_sparsity=initial_sparsity,
            schedule=schedule,
            gradient="masked",
            freeze=end,
            update_every_n_steps=update_every_n_steps,
            **common,
        )

    def score(self, latent: Latent) -> Tensor:
        """Share in what is left of the layer."""
        return functional.lamp_scores(latent.theta)
