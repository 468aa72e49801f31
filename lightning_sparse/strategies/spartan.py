"""Spartan: the largest weights, with the gradient of a soft top-k mask that grows sharper."""

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.checks import check_number, check_window
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["Spartan"]


class Spartan(SparseTraining):
    r"""Keep the largest weights, scaled by a soft mask through which pruned ones are heard.

    .. math::
        w = m \odot \tilde m \odot \theta, \qquad \tilde m = \varsigma(\beta (|\theta| - \tau)), \qquad
        \frac{\partial L}{\partial\theta} = \tilde m \odot g
        + \beta \operatorname{sign}(\theta)\, \tilde m (1 - \tilde m) \odot (g \odot \theta - C), \qquad
        C = \frac{\sum_i g_i \theta_i\, \tilde m_i (1 - \tilde m_i)}{\sum_i \tilde m_i (1 - \tilde m_i)}

    with :math:`g = \partial L / \partial w`, :math:`\varsigma` the sigmoid and the sums over all weights that share a
    budget. The hard mask :math:`m` keeps the :math:`K` largest magnitudes, :math:`\tau` is such that :math:`\tilde m`
    adds up to :math:`K`: the entropic optimal transport of the paper, if every weight costs the same. Both are taken
    anew after every step. :math:`\beta` grows linearly to ``sharpness`` until ``finetune``; then :math:`m \odot
    \tilde m` stays as it is, and only the kept weights train.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        sharpness: Final :math:`\beta`. The authors' script for ResNet-50 on ImageNet sets 10.
        initial_sharpness: First :math:`\beta`.
        start: When the ramp of the sparsity starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        finetune: When the masks are taken for the last time.
        distribution: How the budget is split, see :class:`~lightning_sparse.engine.callback.SparseTraining`.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        The authors' code ends its Sinkhorn iteration when the objective changes by less than 1 %; here :math:`\tau` is
        solved to rounding. Their sparsity counts all parameters of the model by default, here it counts the targets.
        Magnitudes are not normalised, so that how soft the mask is depends on the scale of the weights. Where several
        optimizers share a budget, each step hears the gradients of its own weights only. The FLOPs as a budget, which
        the paper has too, are left out.

    References:
        Tai et al., "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS 2022,
        https://arxiv.org/abs/2205.14107; code https://github.com/facebookresearch/spartan.

    Example:
        >>> Spartan(sparsity=0.9, sharpness=10.0).sharpness
        10.0
    """

    card = Card(
        paper="Tai et al., NeurIPS 2022, https://arxiv.org/abs/2205.14107",
        criterion="the largest, anew at each step until `finetune`",
        projection="mask times a soft mask that grows sharper",
        gradient="chain rule through the soft mask",
        schedule="linear ramp, to the weight",
        dense_gradient="until `finetune`",
        training_flops="2 f_S + f_D until `finetune`, then 3 f_S",
    )
    serves_patterns = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        sharpness: float = 20.0,
        initial_sharpness: float = 1.0,
        start: int | float = 0.0,
        end: int | float = 0.2,
        finetune: int | float = 0.8,
        distribution: Literal["er", "erk", "global", "uniform"] = "global",
        **common: Unpack[Common],
    ) -> None:
        check_number("sharpness", sharpness, negative=False, zero=False)
        check_number("initial_sharpness", initial_sharpness, negative=False, zero=False)
        check_window(start, end, finetune, last="finetune")
        super().__init__(sparsity, start=start, end=end, schedule="linear", distribution=distribution, **common)
        self.sharpness, self.initial_sharpness, self.finetune = sharpness, initial_sharpness, finetune

    def annealed(self, context: Context) -> float:
        """Progress towards ``finetune``; more than 1 after it."""
        return context.position / max(self._clock.at(self.finetune, "finetune"), 1e-9)

    def is_due(self, context: Context) -> bool:
        """Whether masks are taken: no more after ``finetune``."""
        return super().is_due(context) and self.annealed(context) <= 1.0 + 1e-9

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep the soft mask, and by budget its shift, its sharpness and what it takes from each gradient."""
        numbers = {key: torch.zeros((), dtype=torch.float64) for key in ("shift", "beta", "pull")}
        return {"soft": torch.ones_like(theta), **numbers}

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Solve the soft mask beside taking the hard one."""
        thetas = [latent.theta for latent in latents]
        total, near = sum(theta.numel() for theta in thetas), float(latents[0].state["shift"])
        beta = self.initial_sharpness + min(1.0, self.annealed(context)) * (self.sharpness - self.initial_sharpness)
        kept = total - round((sparsity or 0.0) * total)
        shift = functional.soft_topk_shift(thetas, kept, beta, near=near) if 0 < kept < total else near
        numbers = {"shift": torch.tensor(shift, dtype=torch.float64), "beta": torch.tensor(beta, dtype=torch.float64)}
        masks = super().select(latents, sparsity, context)
        return [
            {**mask, **numbers, "soft": functional.soft_topk(theta, shift, beta)}
            for mask, theta in zip(masks, thetas, strict=True)
        ]

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Apply both masks; all weights are kept before there is a budget."""
        super().project(latent, context, out)
        if "mask" in latent.state:
            out.mul_(latent.state["soft"])

    def gather(self, latents: Sequence[Latent], context: Context) -> None:
        """Sum up what the gradients ask of each budget."""
        heard = {latent.name for latent in latents}
        for pool, _ in self.budgets(list(self._weights.latents.values()), context):
            masked = [latent for latent in pool if "mask" in latent.state]
            grads = [latent.weight.grad if latent.name in heard else None for latent in masked]
            softs = [latent.state["soft"] for latent in masked]
            pull = functional.soft_topk_pull(grads, [latent.theta for latent in masked], softs) if masked else 0.0
            for latent in masked:
                latent.state["pull"].fill_(pull)

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Chain rule through the soft mask, straight through the hard one; once they are fixed, through both."""
        soft = latent.state["soft"]
        if "mask" not in latent.state:
            return grad
        if self.annealed(context) > 1.0 + 1e-9:
            return functional.mask_gradient(grad.mul_(soft), latent.mask, out=grad)
        beta, pull = float(latent.state["beta"]), float(latent.state["pull"])
        return functional.soft_topk_gradient(grad, latent.theta, soft, beta, pull)

    def gradient_density(self, density: float, context: Context) -> float:
        """All of the weight gradient until ``finetune``, then that of the kept weights."""
        return 1.0 if self.annealed(context) <= 1.0 + 1e-9 else density
