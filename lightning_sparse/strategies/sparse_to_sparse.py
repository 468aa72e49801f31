"""What sparse-to-sparse methods share: a random mask of a fixed budget, from which weights are dropped and grown."""

import math
from collections.abc import Sequence
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Budgeted, SparseTraining
from lightning_sparse.engine.checks import check_choice, check_fraction
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["SparseToSparse", "random_mask", "random_scores"]


def random_scores(latent: Latent, context: Context) -> Tensor:
    """Random numbers, larger ones for weights that are not zero, so that a model that is sparse already stays so."""
    return functional.draw(latent.theta, context.generator) + (latent.theta != 0)


def random_mask(latent: Latent, sparsity: float, context: Context) -> Tensor:
    """Keep weights at random, those that are not zero first."""
    size = latent.theta.numel()
    return functional.topk_masks([random_scores(latent, context)], size - round(sparsity * size))[0]


class SparseToSparse(SparseTraining):
    r"""Base of the methods that start sparse and stay sparse.

    .. math:: w = m \odot \theta, \qquad \partial L / \partial \theta = m \odot \partial L / \partial w

    The mask :math:`m` is drawn at random within the budget of each layer. Every ``update_every_n_steps`` steps between
    ``start`` and ``end`` a fraction of each layer's kept weights, those of the smallest magnitude, is dropped, and as
    many are grown where :meth:`grow_scores` is largest. Grown weights start from zero.

    A subclass says where to grow.

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        drop_fraction: Fraction of the kept weights that an update drops, in ``[0, 1)``.
        drop_schedule: Whether that fraction stays as it is or falls to zero at ``end`` along a half cosine.
        start: Before which moment no weight is dropped: int = epoch, float = fraction of training.
        end: From which moment on the mask stays as it is.
        update_every_n_steps: Optimizer steps between updates.
        reset_optimizer_state: Whether the optimizer forgets what it knows of grown weights.
        seed: Of the random numbers.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.
    """

    card = Card(criterion="a random mask", schedule="from the first step on, to the weight")
    keeps_latent = False
    serves_patterns = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "erk",
        drop_fraction: float = 0.3,
        drop_schedule: Literal["constant", "cosine"] = "cosine",
        start: int | float = 0.0,
        end: int | float = 0.75,
        update_every_n_steps: int = 100,
        reset_optimizer_state: bool = True,
        seed: int = 0,
        **common: Unpack[Budgeted],
    ) -> None:
        check_choice("distribution", distribution, ("er", "erk", "uniform"))
        check_fraction("drop_fraction", drop_fraction)
        check_choice("drop_schedule", drop_schedule, ("constant", "cosine"))
        super().__init__(
            sparsity,
            start=start,
            end=end,
            initial_sparsity=sparsity,
            schedule="constant",
            distribution=distribution,
            projection="hard",
            gradient="masked",
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.drop_fraction, self.drop_schedule = drop_fraction, drop_schedule
        self.reset_optimizer_state, self.seed = reset_optimizer_state, seed

    def is_due(self, context: Context) -> bool:
        """Whether weights are dropped and grown after this step."""
        return super().is_due(context) and 0.0 < context.progress < 1.0

    def grow_scores(self, latent: Latent, context: Context) -> Tensor:
        """What makes a pruned weight worth growing: numbers like the weight, the largest win."""
        raise NotImplementedError

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Draw the first mask; then drop and grow, where that is due."""
        return [self._select_one(latent, sparsity or 0.0, context) for latent in latents]

    def _select_one(self, latent: Latent, sparsity: float, context: Context) -> dict[str, Tensor]:
        if "mask" not in latent.state:
            return {"mask": random_mask(latent, sparsity, context)}
        # A weight that this step has given no gradient takes no part in it.
        if not self.is_due(context) or (self.needs_gradient and latent.grad is None):
            return {"mask": latent.state["mask"]}
        return self.drop_and_grow(latent, self.fraction(context), context)

    def fraction(self, context: Context) -> float:
        """Fraction of the kept weights to drop now."""
        if self.drop_schedule == "constant":
            return self.drop_fraction
        return self.drop_fraction * (1 + math.cos(math.pi * context.progress)) / 2

    def drop_and_grow(self, latent: Latent, fraction: float, context: Context) -> dict[str, Tensor]:
        """Drop a fraction of the kept weights, the smallest ones, and grow as many, perhaps the same."""
        mask = latent.state["mask"]
        active = int(functional.count_nonzeros([mask]))
        moved = math.floor(active * fraction)
        kept = functional.largest_among(latent.theta.abs(), mask, active - moved)
        return {"mask": kept | functional.largest_among(self.grow_scores(latent, context), ~kept, moved)}
