"""MEST: prune a little more, or grow a little more, than the budget."""

from collections.abc import Sequence
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Budgeted, SparseTraining
from lightning_sparse.engine.checks import check_choice, check_decay, check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["MEST"]


class MEST(SparseTraining):
    r"""The least important weights make room for random ones, ever fewer of them.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    The first mask keeps the largest initial weights. With the mutation ratio :math:`r` of the moment, in fractions of
    the layer, an update prunes the kept weights of the smallest :math:`|\theta| + \lambda |\partial L/\partial\theta|`
    and grows random ones, from zero:

    - ``"EM"`` (elastic mutation) prunes to a sparsity of ``sparsity`` :math:`+\, r` and grows to ``sparsity``;
    - ``"EM&S"`` (with a soft memory bound) prunes to ``sparsity`` and grows to ``sparsity`` :math:`-\, r`, so that the
      layer is denser until the next update.

    Args:
        sparsity: Fraction of zeros among the targeted weights in the end, in ``[0, 1)``; reached exactly.
        variant: Which of the two.
        mutation: From which moment on (int = epoch, float = fraction of training) which ratio holds, in ``[0, 1)``, in
            the order of time. The last one must be 0: from then on the mask stays as it is. None for the ratios that
            the authors use for a sparsity of 0.9, ``{0.0: 0.02, 0.5625: 0.01, 0.75: 0.0}``.
        grad_weight: The :math:`\lambda` in the importance.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        update_every_n_steps: Optimizer steps between updates.
        reset_optimizer_state: Whether the optimizer forgets what it knows of grown weights.
        seed: Of the random numbers.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        As in the authors' code, where ``grad_weight`` is 0 by default and momentum survives; but they update before
        the first batch of every fifth epoch, and prune what lies below a percentile, so that ties go together. The
        last pruning of ``"EM&S"`` goes by magnitude alone.

    References:
        Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", NeurIPS 2021,
        https://arxiv.org/abs/2110.14032; code https://github.com/boone891214/MEST.

    Example:
        >>> MEST(sparsity=0.9, variant="EM&S", mutation={0: 0.1, 90: 0.05, 120: 0.0}).end
        120
    """

    card = Card(
        paper="Yuan et al., NeurIPS 2021, https://arxiv.org/abs/2110.14032",
        criterion="the least important make room for random ones, in a budget that breathes",
        schedule="from the first step on, to the weight",
    )
    keeps_latent = False
    serves_patterns = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        variant: Literal["EM", "EM&S"] = "EM",
        mutation: dict[int | float, float] | None = None,
        grad_weight: float = 0.0,
        distribution: Literal["er", "erk", "uniform"] = "uniform",
        update_every_n_steps: int = 100,
        reset_optimizer_state: bool = False,
        seed: int = 0,
        **common: Unpack[Budgeted],
    ) -> None:
        check_choice("variant", variant, ("EM", "EM&S"))
        self.mutation = {0.0: 0.02, 0.5625: 0.01, 0.75: 0.0} if mutation is None else dict(mutation)
        check_decay("mutation", self.mutation)
        check_number("grad_weight", grad_weight, negative=False)
        check_choice("distribution", distribution, ("er", "erk", "uniform"))
        super().__init__(
            sparsity,
            start=next(iter(self.mutation)),
            end=list(self.mutation)[-1],
            initial_sparsity=sparsity,
            schedule="constant",
            distribution=distribution,
            gradient="masked",
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.variant, self.grad_weight, self.needs_gradient = variant, grad_weight, grad_weight > 0
        self.reset_optimizer_state, self.seed = reset_optimizer_state, seed

    def is_due(self, context: Context) -> bool:
        """Whether weights are pruned and grown after this step."""
        return super().is_due(context) and context.progress < 1.0

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Prune, then grow, where that is due; at first and in the end keep the largest weights."""
        return [self._select_one(latent, sparsity or 0.0, context) for latent in latents]

    def _select_one(self, latent: Latent, sparsity: float, context: Context) -> dict[str, Tensor]:
        due = self.is_due(context)
        if "mask" in latent.state and not due and context.progress < 1.0:
            return {"mask": latent.state["mask"]}
        size, active = latent.theta.numel(), int(functional.count_nonzeros([latent.mask]))
        least = most = size - round(sparsity * size)
        moved = round(self._ratio(context) * size) if due else 0
        if self.variant == "EM":
            least = max(0, least - moved)
        else:
            most = min(size, most + moved)
        scores = latent.theta.abs()
        if latent.grad is not None:
            scores = scores + self.grad_weight * latent.grad.abs()
        kept = functional.largest_among(scores, latent.mask, min(active, least))
        if not moved:
            return {"mask": kept}
        luck = functional.draw(latent.theta, context.generator)
        grown = functional.largest_among(luck, ~kept, most - min(active, least))
        return {"mask": kept | grown, "grown": grown}

    def _ratio(self, context: Context) -> float:
        """The mutation ratio that holds now."""
        ratio = 0.0
        for moment, value in self.mutation.items():
            if (context.elapsed if isinstance(moment, float) else context.epoch) >= moment:
                ratio = value
        return ratio
