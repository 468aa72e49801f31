"""Top-KAST: a sparse network forward, a larger set of weights backward."""

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned
from lightning_sparse.engine.checks import check_fraction, check_number
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.powerprop import Powerpropagation

__all__ = ["TopKAST"]


class TopKAST(Powerpropagation):
    r"""The network sees the largest weights (A); they and the next largest (B, which holds A) are trained.

    .. math::
        w = 1_A \odot \theta, \qquad
        \frac{\partial L}{\partial \theta} = 1_B \odot \left(g
            + \lambda \left(1_A + \tfrac{1}{D} (1 - 1_A)\right) \odot \theta\right)

    with :math:`g = \partial L / \partial w` and :math:`D` = 1 - ``sparsity``. The second term, the exploration loss,
    holds weights that try to enter A back by more than those that are in it. Both sets are taken anew every
    ``update_every_n_steps`` steps, layer by layer. Momentum and weight decay, too, leave alone what lies outside B, and
    the optimizer forgets what it knew of it.

    Args:
        sparsity: Fraction of zeros among the targeted weights, outside A, in ``[0, 1)``; kept exactly.
        backward_sparsity: Fraction of weights outside B, in ``[0, 1)``, as far as they are outside A. It is the same
            share of the pruned weights in every layer. None for none.
        exploration_loss: Coefficient :math:`\lambda`; it acts like weight decay.
        power: Exponent of :class:`Powerpropagation`; 1 for none.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        end: When exploration ends: from then on A stays as it is and B is A; int = epoch, float = fraction of training.
        update_every_n_steps: Optimizer steps between new sets.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        There is no code by the authors; where the paper leaves a choice, the equations above are the choice. Where
        nothing is pruned there is no exploration loss. With ``power`` it acts on the latents. With a pattern B consists
        of groups, too; of weights that compete within their group, it holds those that A keeps and the next largest.

    References:
        Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, https://arxiv.org/abs/2106.03517; with
        ``power``: Schwarz et al., "Powerpropagation", NeurIPS 2021, https://arxiv.org/abs/2110.00296.

    Example:
        >>> TopKAST(sparsity=0.9, backward_sparsity=0.8, power=1.5).backward_sparsity
        0.8
    """

    card = Card(
        paper="Jayakumar et al., NeurIPS 2020, https://arxiv.org/abs/2106.03517",
        criterion="the largest",
        gradient="gradient of the largest and the next largest, with an exploration loss",
        schedule="fixed budget, to the weight",
        dense_gradient="of the next largest, until `end`",
        training_flops="2 f_S + f_B, where B is the largest and the next largest",
    )

    def __init__(
        self,
        sparsity: float = 0.8,
        *,
        backward_sparsity: float | None = 0.5,
        exploration_loss: float = 1e-4,
        power: float = 1.0,
        distribution: Literal["er", "erk", "uniform"] = "uniform",
        end: int | float = 1.0,
        update_every_n_steps: int = 100,
        **common: Unpack[Patterned],
    ) -> None:
        check_fraction("backward_sparsity", 0.0 if backward_sparsity is None else backward_sparsity)
        check_number("exploration_loss", exploration_loss, negative=False)
        super().__init__(
            sparsity,
            power=power,
            start=0,
            end=end,
            initial_sparsity=sparsity,
            schedule="constant",
            distribution=distribution,
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.gradient = "straight_through"
        self.backward_sparsity, self.exploration_loss = backward_sparsity, exploration_loss

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Take A and B anew."""
        masks = [selection["mask"] for selection in super().select(latents, sparsity, context)]
        outside = (sparsity or 0.0) * self._untouched(context)
        return [
            {"mask": mask, "backward_mask": functional.backward_set(self.score(latent), mask, outside, self.pattern)}
            for latent, mask in zip(latents, masks, strict=True)
        ]

    def movable(self, latent: Latent) -> Tensor | None:
        """The entries in B."""
        return latent.state["backward_mask"] if "mask" in latent.state else None

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Add the gradient of the exploration loss, and drop what lies outside B."""
        grad = super().pull_back(latent, grad, context)
        if "mask" not in latent.state:
            return grad
        theta, mask = latent.theta, latent.state["mask"]
        if self.exploration_loss:
            sparsity = self.final_sparsity if latent.sparsity is None else latent.sparsity
            pulled = torch.where(mask, theta, theta / (1.0 - (sparsity or 0.0)))
            grad = grad.add_(pulled, alpha=self.exploration_loss)
        return functional.mask_gradient(grad, latent.state["backward_mask"], out=grad)

    def gradient_density(self, density: float, context: Context) -> float:
        """That of B."""
        return 1.0 - (1.0 - density) * self._untouched(context)

    def _untouched(self, context: Context) -> float:
        """Share of the pruned weights that lie outside B."""
        if context.progress >= 1.0:
            return 1.0
        return min(1.0, (self.backward_sparsity or 0.0) / (self.final_sparsity or 1.0))
