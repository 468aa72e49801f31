"""SNFS: momentum tells where to grow, and in which layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.callback import Common
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.exchange import Exchange

__all__ = ["SNFS"]


class SNFS(Exchange):
    r"""Sparse networks from scratch: the smallest weights make room for those with the largest momentum.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = \frac{\partial L}{\partial w}

    The optimizer hears the dense gradient, so that its momentum :math:`v` knows pruned weights, too; they are set back
    to zero after each step. An update drops, in each layer, a fraction of the kept weights, the smallest ones. All that
    have been dropped are shared out in proportion to the layers' mean :math:`|v|` of kept weights, and grown where
    :math:`|v|` is largest. :math:`v` is the momentum of SGD, :math:`\hat m / (\sqrt{\hat v} + 10^{-8})` of Adam, and
    the gradient where the optimizer keeps neither.

    A weight with a budget of its own exchanges nothing.

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the first mask splits the budget between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        drop_fraction: Fraction of the kept weights that an update drops, in ``[0, 1)``.
        drop_schedule: Whether that fraction stays as it is or falls to zero at ``end`` along a half cosine.
        start: Before which moment no weight is dropped: int = epoch, float = fraction of training.
        end: From which moment on the mask stays as it is.
        update_every_n_steps: Optimizer steps between updates.
        reset_optimizer_state: Whether the optimizer forgets what it knows of grown weights.
        seed: Of the random numbers.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        As in the authors' code a layer of sparsity below 0.2 whose share is above average drops no larger fraction than
        its sparsity, weights just dropped may return with their value, and nothing is forgotten. Here the number of
        kept weights stays the same, to the weight, and a layer may fill up; the authors fill it to 99 %, round up, and
        correct the total later. They update once per epoch and let ``drop_fraction`` fall to 0.005, not to 0.

    References:
        Dettmers and Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019,
        https://arxiv.org/abs/1907.04840; code https://github.com/TimDettmers/sparse_learning.

    Example:
        >>> SNFS(sparsity=0.9, update_every_n_steps=500).drop_fraction
        0.5
    """

    card = replace(
        Exchange.card,
        paper="Dettmers and Zettlemoyer, 2019, https://arxiv.org/abs/1907.04840",
        criterion="the smallest make room for those with the largest momentum, in the layers that have most of it",
        gradient="gradient of the kept weights; the momentum hears all",
        dense_gradient="always",
        training_flops="2 f_S + f_D",
    )
    needs_gradient = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "uniform",
        drop_fraction: float = 0.5,
        drop_schedule: Literal["constant", "cosine"] = "cosine",
        start: int | float = 0.0,
        end: int | float = 1.0,
        update_every_n_steps: int = 100,
        reset_optimizer_state: bool = False,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            sparsity,
            distribution=distribution,
            drop_fraction=drop_fraction,
            drop_schedule=drop_schedule,
            start=start,
            end=end,
            update_every_n_steps=update_every_n_steps,
            reset_optimizer_state=reset_optimizer_state,
            seed=seed,
            **common,
        )
        self.gradient = "straight_through"

    def exchange(self, latents: Sequence[Latent], context: Context) -> list[dict[str, Tensor]]:
        """Share out what is dropped in proportion to mean momentum, and grow where that is largest."""
        masks, momenta = [latent.mask for latent in latents], [latent.momentum for latent in latents]
        counts = functional.count_nonzeros(masks).tolist()
        sums = functional.sum_magnitudes(list(map(functional.hard_threshold, momenta, masks)))
        means = [x / max(1, n) if math.isfinite(x) else 0.0 for x, n in zip(sums.tolist(), counts, strict=True)]
        kept, room = [], []
        for latent, count, mean in zip(latents, counts, means, strict=True):
            fraction, sparsity = self.fraction(context), 1 - count / latent.theta.numel()
            if sparsity < 0.2 and mean * len(means) > sum(means):
                fraction = min(fraction, sparsity)
            stays = count - math.ceil(count * fraction)
            kept.append(functional.largest_among(latent.theta.abs(), latent.mask, stays))
            room.append(latent.theta.numel() - stays)
        dropped = sum(counts) + sum(room) - sum(latent.theta.numel() for latent in latents)
        grown = functional.apportion(dropped, means, room)
        return [
            {"mask": mask | functional.largest_among(momentum.abs(), ~mask, number)}
            for mask, momentum, number in zip(kept, momenta, grown, strict=True)
        ]
