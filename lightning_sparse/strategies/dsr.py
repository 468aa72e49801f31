"""DSR: one adaptive threshold drops weights, the layers that lose least get most of them back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.callback import Common
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.exchange import Exchange

__all__ = ["DSR"]


class DSR(Exchange):
    r"""Dynamic sparse reparameterization: weights below one adaptive threshold make room for random ones.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    An update drops the kept weights with :math:`|\theta| < H`, :math:`H` the same in all layers. As many are grown at
    random, from zero, in layers in proportion to the number of weights that each has left. Then :math:`H` is halved if
    more than 1.1 times as many as wanted have been dropped, doubled if fewer than 0.9 times. No weights are sorted.

    A weight with a budget of its own exchanges nothing, and has an :math:`H` of its own.

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the first mask splits the budget between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        drop_fraction: Fraction of the kept weights of all layers that an update is wanted to drop, in ``[0, 1)``.
        drop_threshold: Initial :math:`H`, ``>= 0``.
        start: Before which moment no weight is dropped: int = epoch, float = fraction of training.
        end: From which moment on the mask stays as it is.
        update_every_n_steps: Optimizer steps between updates.
        reset_optimizer_state: Whether the optimizer forgets what it knows of grown weights.
        seed: Of the random numbers.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        As in the authors' code a weight just dropped does not return at once, unless nothing else is left, and a layer
        keeps one weight at least: here its largest. They want a number of weights, let ``update_every_n_steps`` double
        several times, and leave first convolutions dense (``ignore``). What rounding leaves over goes to the largest
        remainders here, to a random layer there. With several optimizers each exchanges weights among those it steps.

    References:
        Mostafa and Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
        Reparameterization", ICML 2019, https://arxiv.org/abs/1902.05967; code
        https://github.com/IntelAI/dynamic-reparameterization.

    Example:
        >>> DSR(sparsity=0.9, update_every_n_steps=1000).drop_fraction
        0.1
    """

    card = replace(
        Exchange.card,
        paper="Mostafa and Wang, ICML 2019, https://arxiv.org/abs/1902.05967",
        criterion="those below one adaptive threshold make room for random ones, where most are left",
    )

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "uniform",
        drop_fraction: float = 0.1,
        drop_threshold: float = 1e-3,
        start: int | float = 0.0,
        end: int | float = 0.95,
        update_every_n_steps: int = 100,
        reset_optimizer_state: bool = False,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        check_number("drop_threshold", drop_threshold, negative=False)
        super().__init__(
            sparsity,
            distribution=distribution,
            drop_fraction=drop_fraction,
            drop_schedule="constant",
            start=start,
            end=end,
            update_every_n_steps=update_every_n_steps,
            reset_optimizer_state=reset_optimizer_state,
            seed=seed,
            **common,
        )
        self.drop_threshold = drop_threshold

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep the threshold with each weight that shares it."""
        dtype = torch.promote_types(theta.dtype, torch.float32)
        return {"drop_threshold": torch.tensor(self.drop_threshold, dtype=dtype, device=theta.device)}

    def exchange(self, latents: Sequence[Latent], context: Context) -> list[dict[str, Tensor]]:
        """Drop below the threshold, grow at random, adapt the threshold."""
        masks, threshold = [latent.mask for latent in latents], latents[0].state["drop_threshold"]
        bound = float(threshold)
        kept = [mask & ~(latent.theta.abs() < bound) for latent, mask in zip(latents, masks, strict=True)]
        before, left = (functional.count_nonzeros(some).tolist() for some in (masks, kept))
        for index, latent in enumerate(latents):
            if before[index] and not left[index]:
                kept[index], left[index] = functional.largest_among(latent.theta.abs(), masks[index], 1), 1
        dropped, wanted = sum(before) - sum(left), self.drop_fraction * sum(before)
        factor = 0.5 if dropped > 1.1 * wanted else 2.0 if dropped < 0.9 * wanted else 1.0
        limits = torch.finfo(threshold.dtype)
        threshold = (threshold * factor).clamp(limits.tiny, limits.max)
        room = [latent.theta.numel() - count for latent, count in zip(latents, left, strict=True)]
        selections = []
        for latent, old, mask, number in zip(
            latents, masks, kept, functional.apportion(dropped, left, room), strict=True
        ):
            scores = functional.draw(latent.theta, context.generator) + ~old  # what was dropped just now comes last
            grown = functional.largest_among(scores, ~mask, number)
            selections.append({"mask": mask | grown, "grown": grown, "drop_threshold": threshold.clone()})
        return selections
