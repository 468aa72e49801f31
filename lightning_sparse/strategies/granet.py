"""GraNet: gradual pruning with regeneration of weights."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Budgeted, SparseTraining
from lightning_sparse.engine.checks import check_fraction
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.sparse_to_sparse import random_mask

__all__ = ["GraNet"]

# To which fraction the dropping falls.
_LEAST = 0.005


class GraNet(SparseTraining):
    r"""Prune gradually, and let the smallest weights make room for those whose gradient is largest.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    Every ``update_every_n_steps`` steps from ``start`` on

    1. the smallest magnitudes of all layers together are pruned, down to the sparsity that the ramp asks for;
    2. in each layer the smallest :math:`\lceil \rho_t n \rceil` of the :math:`n` weights left are dropped, and as many
       are grown where :math:`|\partial L/\partial w|` is largest. :math:`\rho_t` falls from ``drop_fraction`` to 0.005
       along a half cosine over the whole training, past ``end``; where training is open-ended it stays.

    A weight dropped in 2 may return at once and then keeps its value; all others start from zero.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        initial_sparsity: Sparsity before ``start``, in ``[0, 1)``: 0 to start dense. Else the first mask is random,
            with small layers denser (ERK).
        schedule: Shape of the ramp; cubic in the paper.
        drop_fraction: Fraction of the kept weights that an update drops at first, in ``[0, 1)``.
        update_every_n_steps: Optimizer steps between updates.
        reset_optimizer_state: Whether the optimizer forgets what it knows of grown weights.
        seed: Of the random numbers.
        **common: What strategies with a budget take, see :class:`~lightning_sparse.engine.callback.Budgeted`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        As in the authors' code, but that pruning is exact to the weight and takes place once more at ``end``, so that
        the target is reached; theirs stops one update short of it. They start from ``initial_sparsity`` 0 or 0.5.

    References:
        Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
        https://arxiv.org/abs/2106.10404; code https://github.com/VITA-Group/GraNet.

    Example:
        >>> GraNet(sparsity=0.9, initial_sparsity=0.5).initial_sparsity
        0.5
    """

    card = Card(
        paper="Liu et al., NeurIPS 2021, https://arxiv.org/abs/2106.10404",
        criterion="gradual pruning, with regrowth where the gradient is largest",
        allocation="global pruning; sparse starts by ERK",
        dense_gradient="at updates, every ΔT steps",
        training_flops="2 f_S + ((ΔT - 1) f_S + f_D) / ΔT",
    )
    keeps_latent = False
    serves_patterns = False
    needs_gradient = True
    signed = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0.0,
        end: int | float = 0.7,
        initial_sparsity: float = 0.0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        drop_fraction: float = 0.5,
        update_every_n_steps: int = 100,
        reset_optimizer_state: bool = True,
        seed: int = 0,
        **common: Unpack[Budgeted],
    ) -> None:
        check_fraction("drop_fraction", drop_fraction)
        super().__init__(
            sparsity,
            start=start,
            end=end,
            initial_sparsity=initial_sparsity,
            schedule=schedule,
            gradient="masked",
            update_every_n_steps=update_every_n_steps,
            **common,
        )
        self.drop_fraction, self.reset_optimizer_state, self.seed = drop_fraction, reset_optimizer_state, seed

    def is_due(self, context: Context) -> bool:
        """Whether weights are pruned, dropped and grown after this step."""
        return super().is_due(context) and context.progress > 0.0

    def score(self, latent: Latent) -> Tensor:
        """Magnitude; pruned weights, which are zero, come after those that are kept and zero."""
        return latent.theta.abs() - latent.mask.logical_not().to(latent.theta.dtype)

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Prune across layers, then drop and grow within each; a sparse start is drawn."""
        sparsity = sparsity or 0.0
        if self.initial_sparsity and not any("mask" in latent.state for latent in latents):
            shapes, costs = [latent.weight.shape for latent in latents], [latent.cost for latent in latents]
            shares = functional.erdos_renyi(shapes, sparsity, costs=costs)
            return [{"mask": random_mask(*pair, context)} for pair in zip(latents, shares, strict=True)]
        pruned = super().select(latents, sparsity, context)
        return [self._regenerate(latent, own["mask"], context) for latent, own in zip(latents, pruned, strict=True)]

    def _regenerate(self, latent: Latent, kept: Tensor, context: Context) -> dict[str, Tensor]:
        if latent.grad is None or not self.is_due(context):
            return {"mask": kept}
        fraction = _LEAST + (self.drop_fraction - _LEAST) * (1 + math.cos(math.pi * context.elapsed)) / 2
        active = int(functional.count_nonzeros([kept]))
        moved = math.ceil(active * fraction)
        survivors = functional.largest_among(latent.theta.abs(), kept, active - moved)
        mask = survivors | functional.largest_among(latent.grad.abs(), ~survivors, moved)
        return {"mask": mask, "grown": mask & ~kept}

    def gradient_density(self, density: float, context: Context) -> float:
        """Sparse, dense where an update reads it."""
        return 1.0 if self.is_due(context) else density
