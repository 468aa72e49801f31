"""S-LATS: one prescribed soft threshold for all layers."""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["LATS"]


class LATS(SparseTraining):
    r"""Soft-threshold all layers by one number that rises as an L1 penalty under a cosine learning rate would.

    .. math::
        w = \operatorname{sign}(\theta) \max(|\theta| - \tau, 0), \qquad
        \frac{\partial L}{\partial \theta} = \frac{\partial L}{\partial w}, \qquad
        \tau = D \left(p + \frac{\sin \pi p}{\pi}\right)

    with :math:`p` the progress from ``start`` to ``end``. The threshold moves at every step.

    Args:
        threshold: Final threshold :math:`D`, in the units of the weights.
        start: When the threshold starts to rise: int = epoch, float = fraction of training.
        end: When it reaches ``threshold``.
        pattern: ``"unstructured"``, or ``"block:AxB"`` or ``"channel"``, whose norms the threshold shrinks, see
            :func:`~lightning_sparse.functional.group_soft_threshold`.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Sparsity is an outcome here, not a target: choose ``threshold`` by trial, or use :class:`ST3`, whose threshold
        is the quantile that a wanted sparsity asks for. This is the simplified schedule of the authors (S-LATS), whose
        window is the whole training; the other one follows the learning rate that training has.

    References:
        Chen et al., "A Unified Framework for Soft Threshold Pruning", ICLR 2023,
        https://openreview.net/forum?id=cCFqcrq0d8; code https://github.com/Yanqi-Chen/LATS.

    Example:
        >>> LATS(threshold=0.01).final_threshold
        0.01
    """

    card = Card(
        paper="Chen et al., ICLR 2023, https://openreview.net/forum?id=cCFqcrq0d8",
        criterion="magnitudes above a prescribed threshold",
        projection="soft threshold",
        gradient="straight-through gradient",
        schedule="an outcome of the threshold",
        allocation="one threshold for all layers",
        dense_gradient="always",
        training_flops="2 f_S + f_D",
    )

    def __init__(
        self,
        threshold: float = 0.001,
        *,
        start: int | float = 0.0,
        end: int | float = 1.0,
        pattern: str = "unstructured",
        **common: Unpack[Common],
    ) -> None:
        check_number("threshold", threshold, negative=False)
        super().__init__(
            None, start=start, end=end, projection="soft", gradient="straight_through", pattern=pattern, **common
        )
        if self.pattern is not None and self.pattern.within:
            raise ValueError(f"Expected argument `pattern` to be 'block:AxB' or 'channel', but got {pattern!r}.")
        self.final_threshold = threshold

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Read the threshold off the clock."""
        risen = context.progress + math.sin(math.pi * context.progress) / math.pi
        value = self.final_threshold * risen
        return [{"threshold": torch.tensor(value, dtype=x.theta.dtype, device=x.theta.device)} for x in latents]
