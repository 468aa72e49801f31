"""AutoSparse: learned thresholds with Gradient Annealing."""

from collections.abc import Callable, Sequence
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Budgeted, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.annealing import anneal, annealed_alpha, annealed_density, check_annealing
from lightning_sparse.strategies.str import STR

__all__ = ["AutoSparse"]


class AutoSparse(STR):
    r"""Learned thresholds whose pruned weights keep hearing a fading gradient.

    .. math::
        w = \operatorname{sign}(\theta) \max(|\theta| - \sigma(s), 0), \qquad
        \frac{\partial L}{\partial \theta} = D \odot g, \qquad
        \frac{\partial L}{\partial s} = -\sigma'(s) \sum_i D_i\, g_i \operatorname{sign}(\theta_i)

    with :math:`g = \partial L / \partial w` and :math:`D_i = 1` for kept weights, :math:`\alpha_e` for pruned ones. In
    epoch :math:`e` of :math:`E`, :math:`\alpha_e = \alpha\, \mathrm{decay}(e / E)`
    (:func:`~lightning_sparse.schedules.sigmoid_cosine_decay`), and 0 from ``alpha_reset`` on.

    Beyond the paper, ``sparsity`` (or another budget) makes the outcome certain. Thresholds are then

    .. math::
        \tau_l = c\, \sigma(s_l), \qquad
        \frac{\partial L}{\partial s_l} = -c\, \sigma'(s_l) \sum_i D_i\, g_i \operatorname{sign}(\theta_i)

    where after each step the one factor :math:`c` is solved so that all layers together have the sparsity that the
    schedule asks for. How they share it is learned.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; None for what the
            thresholds come to by themselves.
        alpha: Initial factor :math:`\alpha` for the gradients of pruned weights, in ``[0, 1]``; 0 gives :class:`STR`.
            Larger values let more weights return: higher accuracy, lower sparsity.
        threshold_init: Initial :math:`s`; one learned scalar per layer.
        threshold_weight_decay: L2 penalty on :math:`s`.
        alpha_reset: When :math:`\alpha` becomes 0: int = epoch, float = fraction of training; None for never.
        alpha_in_threshold: Whether :math:`\alpha` enters the gradient of :math:`s`, as the chain rule has it, or kept
            weights alone decide.
        backward_sparsity: Fraction of each layer's weights that get no gradient at all, in ``[0, 1)``: the smallest
            ones, as far as they are pruned. None for none.
        start: With a budget: when its ramp starts: int = epoch, float = fraction of training.
        end: With a budget: when it is met.
        schedule: Shape of the ramp.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Without a budget sparsity is an outcome, not a target. With one, what the thresholds have in common is taken up
        by :math:`c`, and they learn their ratios. There is no code by the authors; where the paper leaves a choice,
        the equations above are the choice. How the thresholds are stepped: see :class:`STR`.

    References:
        Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023,
        https://arxiv.org/abs/2304.06941.

    Example:
        >>> AutoSparse(alpha=0.75, alpha_reset=90).alpha
        0.75
    """

    card = Card(
        paper="Kundu et al., 2023, https://arxiv.org/abs/2304.06941",
        criterion="magnitudes above a threshold learned per layer",
        projection="soft threshold",
        gradient="pruned weights hear the gradient times an annealed α",
        schedule="learned, or with `sparsity` a cubic ramp to the target",
        allocation="learned",
        dense_gradient="while α > 0",
        training_flops="2 f_S + f_D while α > 0, then 3 f_S",
        published="ResNet-50 on ImageNet at 80 %: half the training FLOPs, a seventh of the inference FLOPs (abstract)",
    )

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        alpha: float = 0.5,
        threshold_init: float = -5.0,
        threshold_weight_decay: float = 0.0,
        alpha_reset: int | float | None = 0.9,
        alpha_in_threshold: bool = True,
        backward_sparsity: float | None = None,
        start: int | float = 0.0,
        end: int | float = 0.5,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        **common: Unpack[Budgeted],
    ) -> None:
        check_annealing(alpha, alpha_reset, backward_sparsity)
        check_number("threshold_init", threshold_init)
        SparseTraining.__init__(
            self,
            sparsity,
            start=start,
            end=end,
            schedule=schedule,
            projection="soft",
            gradient="masked",
            threshold_weight_decay=threshold_weight_decay,
            **common,
        )
        if self.goal == "None":
            self.start = self.end = 0
        self.threshold_init = threshold_init
        self.alpha, self.alpha_reset = alpha, alpha_reset
        self.alpha_in_threshold, self.backward_sparsity = alpha_in_threshold, backward_sparsity

    def scale(self, latent: Latent) -> float:
        """The learned part of the threshold."""
        return max(1e-30, float(latent.state["s"].detach().sigmoid()))

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Read the thresholds off the learned scalars, or solve for their common factor if there is a budget."""
        if sparsity is None:
            return super().select(latents, sparsity, context)
        return SparseTraining.select(self, latents, sparsity, context)

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Anneal the gradient of the pruned weights, and leave that of ``s`` in its ``.grad``."""
        mask, alpha = latent.mask, annealed_alpha(self.alpha, self.alpha_reset, context)
        latent_grad = anneal(grad, latent.theta, mask, alpha, self.backward_sparsity)
        heard = latent_grad if self.alpha_in_threshold else functional.mask_gradient(latent_grad, mask)
        self.learn_threshold(latent, heard)
        return latent_grad

    def learn_threshold(self, latent: Latent, latent_grad: Tensor) -> None:
        """Chain rule through the threshold; the common factor is taken as constant."""
        if self.final_sparsity is None:
            super().learn_threshold(latent, latent_grad)
        elif "threshold" in latent.state:
            s, threshold = latent.state["s"], latent.state["threshold"]
            inner = threshold.to(s.dtype) * (1 - s.detach().sigmoid())
            s.grad = inner * functional.threshold_gradient(latent_grad, latent.theta)

    def gradient_density(self, density: float, context: Context) -> float:
        """All of the weight gradient while alpha lasts, then that of the kept weights."""
        return annealed_density(density, annealed_alpha(self.alpha, self.alpha_reset, context), self.backward_sparsity)
