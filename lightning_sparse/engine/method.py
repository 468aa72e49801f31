"""What the engine asks of a method."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from lightning_sparse.engine.latent import Context, Latent

__all__ = ["Method"]


class Method(Protocol):
    """What a method answers; see :class:`~lightning_sparse.engine.callback.SparseTraining`."""

    keeps_latent: bool
    keeps_mask: bool
    compact_optimizer_state: bool
    exact_on_kept: bool
    needs_gradient: bool
    replaces_step: bool
    per_epoch: bool
    reset_optimizer_state: bool
    seed: int
    stochastic: bool
    learner: Literal["adam", "sgd"]
    threshold_weight_decay: float

    def appraise(self, latents: Sequence[Latent]) -> None:
        """Find what the weights cost."""

    def is_due(self, context: Context) -> bool:
        """Whether what lives is chosen anew after this step."""

    def lift(self, weight: Tensor) -> Tensor:
        """The latent of a weight that nothing is pruned from."""

    def movable(self, latent: Latent) -> Tensor | None:
        """Which latent entries the optimizer may move; None for all."""

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Tensors that the method keeps for a weight."""

    def budgets(self, latents: Sequence[Latent], context: Context) -> list[tuple[list[Latent], float | None]]:
        """Weights that compete, group by group, with the sparsity wanted now."""

    def choose(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Mask or threshold of each weight of a group."""

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """What the network sees."""

    def gather(self, latents: Sequence[Latent], context: Context) -> None:
        """Look at all gradients of a step before any is pulled back."""

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """What the latent hears of the gradient."""

    def after_step(self, latent: Latent, lr: float, context: Context) -> None:
        """What happens to a latent that the optimizer has stepped."""

    def learning_rate(self, group: Mapping[str, Any], context: Context) -> float:
        """Of what is learned for the weights in a parameter group."""

    def gradient_density(self, density: float, context: Context) -> float:
        """Fraction of the weight gradient that is needed."""
