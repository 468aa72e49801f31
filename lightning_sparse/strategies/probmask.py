"""ProbMask: a probability for each weight, projected onto the budget after every step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["ProbMask"]

# A probability of 1 would have no gradient. The bisection of the authors' code leaves this one after the first step.
ALMOST_ONE = 1 - 2.0**-21


class ProbMask(SparseTraining):
    r"""Learn with which probability each weight is kept; on average they respect one global budget.

    .. math::
        w = \tilde m \odot \theta, \qquad \tilde m = \varsigma\Big(T \Big(\log\frac{p}{1 - p} + n\Big)\Big), \qquad
        \frac{\partial L}{\partial\theta} = \tilde m \odot g, \qquad
        \frac{\partial L}{\partial p} = T\, \tilde m (1 - \tilde m) \Big(\frac1p + \frac{1}{1 - p}\Big) \theta \odot g

    with :math:`g = \partial L / \partial w`, :math:`\varsigma` the sigmoid and logistic noise :math:`n`, drawn anew for
    every optimizer step. Adam steps the probabilities :math:`p`, which then are projected onto the budget:
    :math:`p \leftarrow \min(\max(p - v, 0), 1)` with the smallest :math:`v \ge 0` for which their sum is at most the
    number of weights to keep. In epoch :math:`e` of :math:`E`, those before ``freeze``,
    :math:`T = 1 / (0.97 (1 - e / E) + 0.03)`, and Adam's learning rate is ``score_lr`` times
    :math:`\tfrac12 (1 + \cos(\pi e / E))`.

    Whenever no batch is trained on, the model holds the most probable of all masks that meet the budget to the weight:
    that of the largest :math:`p` (among equal ones, of the largest magnitudes).

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        score_lr: Initial learning rate of the probabilities.
        start: When the ramp starts: int = epoch, float = fraction of training. Before it the budget is
            all weights, though the probabilities are learned already.
        end: When it reaches ``sparsity``.
        freeze: From when on the mask is fixed and only the kept weights train.
        schedule: Shape of the ramp.
        distribution: How the budget is split, see :class:`~lightning_sparse.engine.callback.SparseTraining`.
        seed: Of the noise.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        The defaults are the authors' 300 epochs and the 20 of fine-tuning that follow. Their code averages the
        gradients of two samples in each step. Here a step has one: the batches of a window of
        ``accumulate_grad_batches`` share it. Their code evaluates, and fixes at the end, a mask that is drawn from
        :math:`p`; most probabilities are 0 or 1 by then, but the draw meets the budget only on average. Gradient
        clipping limits the probabilities by a norm of their own; in the authors' code they count towards the norm of 3.
        Training FLOPs are counted as dense until ``freeze``.

    References:
        Zhou et al., "Effective Sparsification of Neural Networks with Global Sparsity Constraint", CVPR 2021,
        https://arxiv.org/abs/2105.01571; code https://github.com/x-zho14/ProbMask-official.

    Example:
        >>> ProbMask(sparsity=0.9, freeze=300, start=48, end=180).score_lr
        0.006
    """

    card = Card(
        paper="Zhou et al., CVPR 2021, https://arxiv.org/abs/2105.01571",
        criterion="the most probable, with probabilities that are learned",
        projection="mask; while it trains a soft mask drawn from the probabilities",
        gradient="chain rule through the soft mask",
        dense_gradient="until `freeze`",
        training_flops="3 f_D until `freeze`, then 3 f_S",
    )
    learner = "adam"
    stochastic, serves_patterns = True, False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        score_lr: float = 6e-3,
        start: int | float = 0.15,
        end: int | float = 0.5625,
        freeze: int | float = 0.9375,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["er", "erk", "global", "uniform"] = "global",
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        check_number("score_lr", score_lr, negative=False)
        super().__init__(
            sparsity, start=start, end=end, freeze=freeze, schedule=schedule, distribution=distribution, **common
        )
        self.score_lr, self.seed = score_lr, seed

    def elapsed(self, context: Context) -> float:
        """Fraction of the epochs before ``freeze`` that are over."""
        assert self.freeze is not None
        return min(1.0, context.epoch / max(self._clock.at(self.freeze, "freeze"), 1e-9))

    def temperature(self, context: Context) -> float:
        """How near to zero and one the sampled masks are."""
        return 1.0 / (0.97 * (1.0 - self.elapsed(context)) + 0.03)

    def learning_rate(self, group: Mapping[str, Any], context: Context) -> float:
        """Of the probabilities, whatever that of the weights is."""
        return self.score_lr * 0.5 * (1.0 + math.cos(math.pi * self.elapsed(context)))

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep a probability per weight, at first so near to 1 that all weights are kept."""
        dtype = torch.promote_types(theta.dtype, torch.float32)
        return {"p": torch.full_like(theta, ALMOST_ONE, dtype=dtype).requires_grad_()}

    def samples(self, latent: Latent, context: Context) -> bool:
        """Whether the network sees a sample: in training, of all weights but those that are to stay dense."""
        return context.training and (self.final_sparsity if latent.sparsity is None else latent.sparsity) != 0.0

    def choose(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Keep the probabilities probabilities where there is no budget to project them onto."""
        for latent in latents if sparsity == 0.0 else ():
            latent.state["p"].detach().clamp_(0.0, 1.0)
        return super().choose(latents, sparsity, context)

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Project the probabilities onto the budget, and keep the largest."""
        probabilities = [latent.state["p"].detach() for latent in latents]
        kept = self.afford(latents, probabilities, sparsity or 0.0)
        shift = functional.budget_shift(probabilities, kept)
        for p in probabilities:
            p.sub_(shift).clamp_(0.0, 1.0)
        masks = functional.likeliest_masks(probabilities, [latent.theta for latent in latents], kept)
        return [{"mask": mask} for mask in masks]

    def sample(self, latent: Latent, context: Context) -> Tensor:
        """The relaxed mask of this step."""
        noise = functional.draw(latent.theta, latent.noise)
        return functional.relaxed_mask(latent.state["p"].detach(), noise, self.temperature(context))

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Mask with a sample while a batch is trained on."""
        if self.samples(latent, context):
            out.copy_(latent.theta * self.sample(latent, context))
        else:
            super().project(latent, context, out)

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Chain rule through the sample, and leave the gradient of ``p`` in its ``.grad``."""
        if not self.samples(latent, context):
            return functional.mask_gradient(grad, latent.mask, out=grad)
        p, mask = latent.state["p"], self.sample(latent, context)
        heard = (grad * latent.theta).to(p.dtype)
        p.grad = functional.relaxed_mask_gradient(heard, mask, p.detach(), self.temperature(context))
        return (grad * mask).to(grad.dtype)
