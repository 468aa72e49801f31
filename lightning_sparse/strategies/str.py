"""STR: soft threshold weight reparameterization, one learned threshold per layer."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["STR"]


class STR(SparseTraining):
    r"""Learn one threshold per layer; weight decay on the thresholds drives the sparsity.

    .. math::
        w = \operatorname{sign}(\theta) \max(|\theta| - \sigma(s), 0), \qquad
        \frac{\partial L}{\partial \theta} = m \odot g, \qquad
        \frac{\partial L}{\partial s} = -\sigma'(s) \sum_i m_i\, g_i \operatorname{sign}(\theta_i)

    with :math:`g = \partial L / \partial w`, :math:`m = [\,|\theta| > \sigma(s)\,]` and :math:`\sigma` the sigmoid. The
    thresholds belong to the callback. Their own SGD follows, at every step, the learning rate of the parameter group in
    which the weight lives and, where that optimizer is SGD, its momentum and Nesterov flag (else momentum 0.9).

    Args:
        threshold_init: Initial :math:`s`; -3200 in the authors' ResNet-50 recipe.
        threshold_weight_decay: L2 penalty on :math:`s`; 2.25e-5 in that recipe. Alone, it moves :math:`s` towards zero
            by the factor :math:`\exp(-\text{decay} \sum \text{lr} / (1 - \text{momentum}))`: in a run shorter than the
            authors' 500,000 steps start nearer to zero or decay faster.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a pattern matches nothing.

    Note:
        Sparsity is an outcome here, not a target. The Trainer's gradient clipping limits the gradients of the
        thresholds by a norm of their own; in the authors' code they would count towards that of the model.

    References:
        Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020,
        https://arxiv.org/abs/2002.03231; code https://github.com/RAIVNLab/STR.

    Example:
        >>> STR(threshold_init=-8.0, threshold_weight_decay=1e-3).final_sparsity is None
        True
    """

    card = Card(
        paper="Kusupati et al., ICML 2020, https://arxiv.org/abs/2002.03231",
        criterion="magnitudes above a threshold learned per layer",
        projection="soft threshold",
        schedule="driven by the thresholds' weight decay",
        allocation="learned",
        published="ResNet-50 on ImageNet, top-1: 76.12 at 81.27 %, 74.31 at 90.23 %, 70.23 at 95.15 %,"
        " 67.78 at 96.11 %, 61.46 at 98.05 %, 51.82 at 98.98 %; MobileNetV1: 68.35 at 75.28 %, 62.10 at 89.01 %"
        " (authors' README)",
    )
    serves_patterns = False

    def __init__(
        self,
        *,
        threshold_init: float = -3200.0,
        threshold_weight_decay: float = 2.25e-5,
        **common: Unpack[Common],
    ) -> None:
        check_number("threshold_init", threshold_init)
        super().__init__(
            None,
            start=0,
            end=0,
            projection="soft",
            gradient="masked",
            threshold_weight_decay=threshold_weight_decay,
            **common,
        )
        self.threshold_init = threshold_init

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep one learnable scalar per weight."""
        dtype = torch.promote_types(theta.dtype, torch.float32)
        return {"s": torch.tensor(self.threshold_init, dtype=dtype, device=theta.device, requires_grad=True)}

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Read the thresholds off the learned scalars."""
        return [{"threshold": latent.state["s"].detach().sigmoid().to(latent.theta.dtype)} for latent in latents]

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Drop the gradient of the pruned weights, and leave that of ``s`` in its ``.grad``."""
        latent_grad = functional.mask_gradient(grad, latent.mask, out=grad)
        self.learn_threshold(latent, latent_grad)
        return latent_grad

    def learn_threshold(self, latent: Latent, latent_grad: Tensor) -> None:
        """Chain rule through the threshold, for a gradient that has been scaled already."""
        s = latent.state["s"]
        sigma = s.detach().sigmoid()
        s.grad = sigma * (1 - sigma) * functional.threshold_gradient(latent_grad, latent.theta)
