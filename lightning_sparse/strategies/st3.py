"""ST-3: soft thresholding, straight-through gradients, progressive global sparsity."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.functional.sharding import local

__all__ = ["ST3", "ST3Sigma"]


class ST3(SparseTraining):
    r"""Soft thresholds in the forward pass, the unchanged gradient in the backward pass, one global quantile.

    .. math::
        w = c_o \operatorname{sign}(\theta) \max(|\theta| - \tau, 0), \qquad
        \frac{\partial L}{\partial \theta} = \frac{\partial L}{\partial w}

    :math:`\tau` is the quantile of :math:`|\theta|` over all targets at the sparsity wanted now, taken anew after every
    step, and :math:`c_o` gives every output channel the magnitude back that its pruned weights took away
    (:func:`~lightning_sparse.functional.channel_scale`).

    Beyond the paper, weights may have a ``pattern``. The norm of a group (the root of its mean square, the magnitude in
    a group of one) then takes the place of the magnitude:

    .. math:: w_g = c_o\, \theta_g \max\Big(1 - \frac{\tau}{\lVert \theta_g \rVert}, 0\Big)

    with :math:`\tau` the quantile of the norms, a group counting as many weights as it has; with ``"n:m"``, that of the
    magnitudes that may go, of which no threshold exceeds the largest in its group (that of :class:`SSTE` from ``end``
    on). The gradient stays straight-through, and :math:`c_o` what it is, given which weights live; whole channels it
    leaves as they are.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``.
        start: When the ramp starts: int = epoch, float = fraction of training. Authors: epoch 5 of 160 (CIFAR) or of
            100 (ImageNet).
        end: When it reaches ``sparsity``. Authors: epoch 80 of 160 (CIFAR) or 50 of 100 (ImageNet).
        schedule: Shape of the ramp; cubic in the paper.
        rescale: Whether to rescale the output channels.
        freeze: After which moment w is baked into the weights and only the kept ones train. The authors do so for ten
            more epochs after the last; None for never.
        update_every_n_steps: Optimizer steps between new thresholds; 1 in the paper.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Equal magnitudes at the threshold are pruned together, as in the authors' code. Weight decay acts on the
        latents, pruned ones included; that is part of the method.

    References:
        Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you need for
        Sparse Training?", WACV 2023, https://arxiv.org/abs/2212.01076; code https://github.com/vanderschuea/stthree.
        With a pattern: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006, and
        Hu et al., as :class:`SSTE`.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[ST3(sparsity=0.9)], accelerator="cpu", logger=False, max_epochs=1)
    """

    card = Card(
        paper="Vanderschueren and De Vleeschouwer, WACV 2023, https://arxiv.org/abs/2212.01076",
        criterion="magnitudes above a global quantile",
        projection="soft threshold, channels rescaled",
        gradient="straight-through gradient",
        schedule="cubic ramp to the target",
        allocation="global",
        dense_gradient="always",
        training_flops="2 f_S + f_D",
        published="ResNet-50 on ImageNet, top-1: 76.95 at 80 %, 76.03 at 90 %, 74.46 at 95 %, 73.31 at 96.5 %,"
        " 70.46 at 98 %, 63.88 at 99 % (authors' README)",
    )

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0.05,
        end: int | float = 0.5,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        rescale: bool = True,
        freeze: int | float | None = None,
        update_every_n_steps: int = 1,
        **common: Unpack[Patterned],
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=end,
            schedule=schedule,
            projection="soft",
            gradient="straight_through",
            freeze=freeze,
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.rescale = rescale

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Soft-threshold, then rescale the output channels."""
        if not self.rescale or "threshold" not in latent.state:
            super().project(latent, context, out)
        elif self.pattern is None:
            functional.rescaled_soft_threshold(latent.theta, latent.state["threshold"], out=out)
        else:
            super().project(latent, context, out)
            local(out).mul_(functional.channel_scale(latent.theta, out != 0))


class ST3Sigma(ST3):
    r"""ST-3 whose thresholds follow the scale of each layer's initialisation.

    Magnitudes compete as :math:`|\theta| / \sigma_l`, with :math:`\sigma_l = 1 / \sqrt{\sum_d \text{shape}_d}` (the sum
    of all dimensions of the weight, not their product). A layer's threshold is :math:`\tau \sigma_l`. Compared with
    :class:`ST3`, more of the remaining weights lie in cheap layers.

    Takes the arguments of :class:`ST3`.

    References:
        As :class:`ST3`; :math:`\sigma_l` from the authors' code.

    Example:
        >>> ST3Sigma(sparsity=0.9).final_sparsity
        0.9
    """

    card = replace(
        ST3.card,
        criterion="the same, magnitudes normalised per layer: fewer FLOPs",
        published="ResNet-50 on ImageNet, top-1: 76.44 at 80 %, 75.28 at 90 %, 73.69 at 95 %, 72.62 at 96.5 %,"
        " 69.75 at 98 %, 63.25 at 99 % (authors' README)",
    )

    def scale(self, latent: Latent) -> float:
        """The standard deviation by which magnitudes are normalised."""
        sigma: float = sum(latent.theta.shape) ** -0.5
        return sigma
