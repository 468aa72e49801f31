"""Keep the zeros that a model has, whoever made them."""

from collections.abc import Sequence
from typing import Unpack

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["KeepMask"]


class KeepMask(SparseTraining):
    r"""Fine-tune a sparse model and keep its zeros.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    The mask :math:`m` is that of the nonzero weights at the start of ``fit``, whichever program has pruned them. It
    stays as it is: the model ends with the sparsity that it starts with.

    Args:
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`. A pruned embedding,
            for one, has to be named in ``targets``.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        A weight that is zero as a whole is one that starts from zero, not a pruned one: it trains dense, and a warning
        says so.

    Example:
        >>> KeepMask(ignore=["head"]).final_sparsity is None
        True
    """

    card = Card(
        criterion="what is not zero in the model given",
        schedule="that of the model given",
        allocation="that of the model given",
    )
    keeps_latent = False
    keeps_mask = True
    serves_patterns = False

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(None, start=0, end=0, gradient="masked", **common)

    def is_due(self, context: Context) -> bool:
        """Never after training has begun."""
        return False

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Adopt the zeros of weights whose mask is not known yet."""
        counts = functional.count_nonzeros([latent.theta for latent in latents]).tolist()
        masks = [self._adopt(latent, count) for latent, count in zip(latents, counts, strict=True)]
        if sum(counts) == sum(latent.theta.numel() for latent in latents):
            rank_zero_warn(
                "`KeepMask` has pruned nothing: the model has no zeros to keep. Load the sparse weights before `fit`."
            )
        return [{"mask": mask} for mask in masks]

    def _adopt(self, latent: Latent, nonzeros: int) -> Tensor:
        if "mask" in latent.state:
            return latent.state["mask"]
        if nonzeros or not latent.theta.numel():
            return latent.theta != 0
        rank_zero_warn(
            f"`KeepMask` leaves `{latent.name}` dense: all of it is zero, as if it was to start from zero."
            " If it has been pruned away, remove the layer or stop its training."
        )
        return torch.ones_like(latent.theta, dtype=torch.bool)
