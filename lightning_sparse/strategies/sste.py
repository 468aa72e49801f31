"""S-STE: n of m weights by a soft threshold in each group."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Common, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.functional.sharding import local, whole

__all__ = ["SSTE"]


class SSTE(SparseTraining):
    r"""Of each m consecutive inputs n live, shrunk by the next one, so that none jumps as it comes or goes.

    .. math::
        w = \beta \operatorname{sign}(\theta) \max(|\theta| - \tau, 0), \qquad
        \frac{\partial L}{\partial \theta} = \frac{\partial L}{\partial w} + \lambda (1 - m) \odot \theta, \qquad
        \beta = \frac{\langle \theta_0, s_0 \rangle}{\langle s_0, s_0 \rangle}

    :math:`\tau` is the (m - n)-th smallest magnitude of the group and :math:`m` the mask of what exceeds it. The scale
    :math:`\beta` of a weight is that at which :math:`w` comes nearest to :math:`\theta` at the start, where
    :math:`s_0` is the soft-thresholded :math:`\theta_0`; it stays as it is.

    Args:
        pattern: ``"n:m"``; 2:4 in the paper. Weights whose inputs do not divide stay dense.
        masked_decay: Weight decay :math:`\lambda` of the pruned latents, in the gradient.
        **common: What all strategies take, see :class:`~lightning_sparse.engine.callback.Common`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        As in the authors' code, of weights that equal the threshold none is left. ``masked_decay`` is the decay of
        their earlier paper (Hu et al., ICML 2024), which their code for this one does without. For speed they prune
        gradients at random in the backward pass and multiply in 8 bits; here both are exact.

    References:
        Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", NeurIPS 2024,
        https://arxiv.org/abs/2409.09099; code https://github.com/huyz2023/2by4-pretrain and
        https://github.com/thu-ml/2by4-pretrain-acc-examples.

    Example:
        >>> SSTE("2:4").final_sparsity
        0.5
    """

    card = Card(
        paper="Hu et al., NeurIPS 2024, https://arxiv.org/abs/2409.09099",
        criterion="the n largest of each m inputs",
        projection="soft threshold per group, rescaled",
        gradient="straight-through",
        schedule="from the first step on",
        allocation="n of m in all layers",
        dense_gradient="always",
        training_flops="2 f_S + f_D",
    )

    def __init__(self, pattern: str = "2:4", *, masked_decay: float = 0.0, **common: Unpack[Common]) -> None:
        check_number("masked_decay", masked_decay, negative=False)
        if not functional.parse_pattern(pattern).within:
            raise ValueError(f"Expected argument `pattern` to be 'n:m', but got {pattern!r}.")
        super().__init__(None, start=0, end=0, gradient="straight_through", pattern=pattern, **common)
        self.masked_decay = masked_decay

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Keep the scale that the weight starts with."""
        assert self.pattern is not None
        full = whole(theta).double()
        soft = functional.group_soft_threshold(full, self.pattern)
        square = soft.square().sum()
        scale = torch.where(square > 0, (full * soft).sum() / square, 1.0)
        return {"scale": scale.to(torch.promote_types(theta.dtype, torch.float32))}

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Mark what exceeds the threshold of its group."""
        assert self.pattern is not None
        return [{"mask": functional.group_soft_threshold(latent.theta, self.pattern) != 0} for latent in latents]

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Soft-threshold each group, then scale."""
        assert self.pattern is not None
        functional.group_soft_threshold(latent.theta, self.pattern, out=out)
        local(out).mul_(latent.state["scale"])
        if "mask" in latent.state:
            latent.state["mask"] = out != 0  # also where a step was interrupted before the selection

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Add the decay of the pruned latents."""
        if self.masked_decay and "mask" in latent.state:
            pruned = functional.hard_threshold(latent.theta, ~latent.state["mask"])
            grad = grad.add_(pruned, alpha=self.masked_decay)
        return grad
