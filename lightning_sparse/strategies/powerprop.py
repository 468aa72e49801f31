"""Powerpropagation: weights as powers of their latents, so that the large ones learn faster."""

from collections.abc import Callable
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining
from lightning_sparse.engine.checks import check_number
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["Powerpropagation"]


class Powerpropagation(SparseTraining):
    r"""Let the rich get richer: a weight's gradient grows with its magnitude, so that many stay small enough to prune.

    .. math::
        w = m \odot \operatorname{sign}(\theta)\, |\theta|^a, \qquad
        \frac{\partial L}{\partial \theta} = a\, |\theta|^{a - 1} \odot m \odot \frac{\partial L}{\partial w}

    Training starts from :math:`\theta = \operatorname{sign}(w) |w|^{1/a}`, so that the network starts from the weights
    that it has. The mask :math:`m` keeps the largest magnitudes. It is taken anew every ``update_every_n_steps`` steps
    from ``start`` to ``end`` and then stays.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly. 0 for a
            dense model that is to be pruned later.
        power: Exponent :math:`a`, at least 1, which gives plain magnitude pruning.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        initial_sparsity: Sparsity before ``start``, in ``[0, 1)``.
        schedule: Shape of the ramp.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        update_every_n_steps: Optimizer steps between new masks.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        A weight that is zero stays zero if ``power`` exceeds 1. The optimizer's momentum and weight decay act on the
        latents. Optimizers that normalise each gradient, such as Adam, undo much of
        the effect. The paper prunes once, after training; here a gradual ramp does, during it.

    References:
        Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", NeurIPS 2021,
        https://arxiv.org/abs/2110.00296.

    Example:
        >>> Powerpropagation(sparsity=0.9, power=3.0).power
        3.0
    """

    card = Card(
        paper="Schwarz et al., NeurIPS 2021, https://arxiv.org/abs/2110.00296",
        criterion="the largest",
        projection="mask of latents raised to a power",
        gradient="chain rule, kept weights only",
    )

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        power: float = 2.0,
        start: int | float = 0.2,
        end: int | float = 0.8,
        initial_sparsity: float = 0.0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["er", "erk", "global", "lamp", "uniform"] = "global",
        update_every_n_steps: int = 100,
        **common: Unpack[Patterned],
    ) -> None:
        check_number("power", power)
        if power < 1:
            raise ValueError(f"Expected argument `power` to be a number >= 1, but got {power!r}.")
        super().__init__(
            sparsity,
            start=start,
            end=end,
            initial_sparsity=initial_sparsity,
            schedule=schedule,
            distribution=distribution,
            gradient="masked",
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.power = power

    def is_due(self, context: Context) -> bool:
        """Whether a new mask is taken: no more after ``end``."""
        return super().is_due(context) and context.progress < 1.0

    def lift(self, weight: Tensor) -> Tensor:
        """The root of the weight."""
        return functional.signed_power(weight, 1.0 / self.power)

    def score(self, latent: Latent) -> Tensor:
        """The latents, whose order is that of the weights; groups are compared by the weights themselves."""
        return latent.theta if self.pattern is None else functional.signed_power(latent.theta, self.power)

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Mask, then raise to the power."""
        super().project(latent, context, out)
        functional.signed_power(out, self.power, out=out)

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Chain rule through power and mask."""
        grad = super().pull_back(latent, grad, context)
        return functional.power_gradient(grad, latent.theta, self.power, out=grad)
