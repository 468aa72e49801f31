"""Deep Rewiring: connections with fixed signs, whose weights walk at random, die at zero and are born elsewhere."""

from dataclasses import replace
from typing import Literal, Unpack

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.callback import Common
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse, random_mask

__all__ = ["DeepRewiring"]


class DeepRewiring(SparseToSparse):
    r"""Connections keep their signs; one whose weight crosses zero makes room for a random other one.

    .. math:: w = m \odot \kappa \odot \theta, \qquad \kappa \in \{-1, 1\}, \qquad \theta \ge 0

    After each optimizer step, with learning rate :math:`\eta` and standard normal :math:`\nu`, each connection moves by

    .. math:: \theta \leftarrow \theta - \eta \lambda + \eta \sigma \nu

    and those with :math:`\theta < 0` are cut. As many are made at random among all that are not connected, from zero,
    so that their number stays the same in each layer. With plain SGD that samples from a posterior of networks and
    weights, at the temperature :math:`\eta \sigma^2 / 2`; with any other optimizer it is a heuristic, and a warning
    says so.

    The parameter holds :math:`w`. The sign of an entry is that of its initial weight, drawn where that is zero.

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        l1: :math:`\lambda`, the L1 penalty on connections, ``>= 0``.
        noise: :math:`\sigma`, the standard deviation of the noise in the gradient, ``>= 0``.
        end: From which moment on the mask stays as it is, and kept weights train without noise, penalty and fixed
            signs: int = epoch, float = fraction of training.
        seed: Of the random numbers.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Noise as in the authors' code: times the learning rate, where the paper has :math:`\sqrt{2 \eta T}\,\nu`. New
        connections start from zero as in the paper, from 1e-12 in the code, and signs are those of the initial weights,
        which are random there, too. Of their variants this is the one with a constraint per layer. For each weight
        random numbers are drawn at every step, on the CPU.

    References:
        Bellec et al., "Deep Rewiring: Training very sparse deep networks", ICLR 2018, Algorithm 1,
        https://arxiv.org/abs/1711.05136; code https://github.com/guillaumeBellec/deep_rewiring.

    Example:
        >>> DeepRewiring(sparsity=0.98, l1=1e-4).noise
        1e-05
    """

    card = replace(
        SparseToSparse.card,
        paper="Bellec et al., ICLR 2018, https://arxiv.org/abs/1711.05136",
        criterion="those that have kept their signs; others make room for random ones",
        gradient="gradient of the kept weights, with noise and an L1 penalty",
    )

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "uniform",
        l1: float = 1e-5,
        noise: float = 1e-5,
        end: int | float = 1.0,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        check_number("l1", l1, negative=False)
        check_number("noise", noise, negative=False)
        super().__init__(sparsity, distribution=distribution, end=end, update_every_n_steps=1, seed=seed, **common)
        self.l1, self.noise, self._warned = l1, noise, False

    def after_step(self, latent: Latent, lr: float, context: Context) -> None:
        """Let the connections decay and walk."""
        if "positive" not in latent.state or not self.is_due(context):
            return
        dtype = torch.promote_types(latent.theta.dtype, torch.float32)
        step = (0.5 - latent.state["positive"].to(dtype)) * (2 * lr * self.l1)
        if self.noise:
            step += functional.draw(latent.theta, context.generator, normal=True).to(dtype) * (lr * self.noise)
        latent.theta.add_(functional.hard_threshold(step, latent.mask))

    def _select_one(self, latent: Latent, sparsity: float, context: Context) -> dict[str, Tensor]:
        if "mask" in latent.state:
            return super()._select_one(latent, sparsity, context)
        theta, luck = latent.theta, functional.draw(latent.theta, context.generator)
        return {
            "positive": torch.where(theta == 0, luck < 0.5, theta > 0),
            "mask": random_mask(latent, sparsity, context),
        }

    def drop_and_grow(self, latent: Latent, fraction: float, context: Context) -> dict[str, Tensor]:
        """Cut the connections that have crossed zero, make as many others."""
        if not self._warned and any(isinstance(slot, Tensor) and slot.ndim for slot in latent.slots.values()):
            self._warned = True
            rank_zero_warn(
                "`DeepRewiring` samples networks only with plain SGD, but the optimizer has a memory of past gradients,"
                " with which it is a heuristic. Use `torch.optim.SGD` without momentum."
            )
        mask, theta = latent.mask, latent.theta
        cut = mask & torch.where(latent.state["positive"], theta < 0, theta > 0)
        number = int(functional.count_nonzeros([cut]))
        if not number:
            return {"mask": mask}
        kept = mask & ~cut
        grown = functional.largest_among(functional.draw(theta, context.generator), ~kept, number)
        return {"mask": kept | grown, "grown": grown}
