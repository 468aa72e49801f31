"""OptG: a score per weight, learned from the gradient, chooses what lives in each epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Budgeted, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["OptG"]


class OptG(SparseTraining):
    r"""Learn a score for each weight and keep the highest ones, chosen anew when an epoch begins.

    .. math::
        w = m \odot \theta, \qquad
        \frac{\partial L}{\partial \theta} = m \odot g, \qquad
        \frac{\partial L}{\partial q} = \theta \odot g

    with :math:`g = \partial L / \partial w` and :math:`m` the largest scores :math:`q` of all layers together. In epoch
    :math:`e` the sparsity is :math:`s\,\sigma(\beta (e - E/2))`, with :math:`\sigma` the sigmoid and :math:`E` the
    epoch of ``end``, and the learning rate of the scores is that of their weights times the same sigmoid. The scores
    start from zero and belong to the callback; they are stepped like the thresholds of
    :class:`~lightning_sparse.strategies.str.STR`, without weight decay.

    Args:
        sparsity: Fraction of zeros among the targeted weights from the last epoch before ``end`` on, in ``[0, 1)``.
        end: When the ramp is over: int = epoch, float = fraction of training.
        beta: How steep the ramp is, per epoch, ``>= 0``.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        As in the authors' code, who train 100 epochs with :math:`\beta = 1`. So that short ramps, too, end with the
        sparsity asked for, to the weight, the last epoch before ``end`` has all of it. The first epoch, in which all
        scores are equal, prunes nothing, there as here; if the ramp ends within it, that prunes. Where scores are all
        zero later, as in a run resumed without them, magnitudes stand in for them.

    References:
        Zhang et al., "OptG: Optimizing Gradient-driven Criteria in Network Sparsity", 2022,
        https://arxiv.org/abs/2201.12826; code https://github.com/zyxxmu/OptG.

    Example:
        >>> OptG(sparsity=0.9, beta=2.0).final_sparsity
        0.9
    """

    card = Card(
        paper="Zhang et al., 2022, https://arxiv.org/abs/2201.12826",
        criterion="the highest of scores that the gradient teaches, chosen anew in each epoch",
        schedule="sigmoid ramp, to the weight",
        allocation="global",
        dense_gradient="always",
        training_flops="2 f_S + f_D",
        published="ResNet-50 on ImageNet, top-1: 74.55 at 90 %, 72.45 at 95 %, 70.85 at 96.5 %,"
        " 67.20 at 98 %, 62.10 at 99 % (authors' README)",
    )
    exact_on_kept = True
    per_epoch = True
    signed = True
    serves_patterns = False

    def __init__(
        self, sparsity: float = 0.9, *, end: int | float = 1.0, beta: float = 1.0, **common: Unpack[Budgeted]
    ) -> None:
        check_number("beta", beta, negative=False)
        super().__init__(sparsity, start=0, end=end, schedule="linear", gradient="masked", **common)
        self.beta = beta

    def is_due(self, context: Context) -> bool:
        """Never within an epoch."""
        return False

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep one learnable score per entry."""
        dtype = torch.promote_types(theta.dtype, torch.float32)
        return {"scores": torch.zeros_like(theta, dtype=dtype).requires_grad_()}

    def ramp(self, context: Context) -> float:
        """The sigmoid of this epoch, in ``[0, 1]``."""
        return (1.0 + math.tanh(self.beta * (context.epoch - self._length(context) / 2) / 2)) / 2

    def way(self, context: Context) -> float:
        """Nothing in the first epoch, all of it in the last one, in between the sigmoid."""
        if context.progress < 1.0 and context.epoch < 1:
            return 0.0
        return 1.0 if context.progress >= 1.0 or context.epoch + 1 >= self._length(context) else self.ramp(context)

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Keep the highest scores, the same ones throughout an epoch."""
        if context.position > context.epoch and all("mask" in latent.state for latent in latents):
            return [{"mask": latent.state["mask"]} for latent in latents]
        scores = [latent.state["scores"].detach() for latent in latents]
        if not functional.count_nonzeros(scores).any():
            scores = [latent.theta.abs() for latent in latents]
        masks = functional.topk_masks(scores, self.afford(latents, scores, sparsity or 0.0), signed=True)
        return [{"mask": mask} for mask in masks]

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Leave the gradient of the scores in their ``.grad``, and drop that of the pruned weights."""
        scores = latent.state["scores"]
        scores.grad = latent.theta.to(scores.dtype) * grad
        return super().pull_back(latent, grad, context)

    def learning_rate(self, group: Mapping[str, Any], context: Context) -> float:
        """That of the weights, times the ramp."""
        return super().learning_rate(group, context) * self.ramp(context)

    def gradient_density(self, density: float, context: Context) -> float:
        """The scores of pruned weights hear the gradient, too."""
        return 1.0

    def _length(self, context: Context) -> float:
        """Of the ramp, in epochs."""
        return self.end * context.epochs if self.end and isinstance(self.end, float) else self.end
