"""What sparse-to-sparse methods share that move weights between layers."""

from collections.abc import Sequence

from torch import Tensor

from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse, random_mask

__all__ = ["Exchange"]


class Exchange(SparseToSparse):
    """Base of the methods whose updates move weights between layers.

    A weight with a budget of its own exchanges nothing. For the arguments see :class:`SparseToSparse`; a subclass says
    how weights are exchanged.
    """

    def exchange(self, latents: Sequence[Latent], context: Context) -> list[dict[str, Tensor]]:
        """Drop and grow among weights that this step has moved; what :meth:`select` returns of them."""
        raise NotImplementedError

    def budgets(self, latents: Sequence[Latent], context: Context) -> list[tuple[list[Latent], float | None]]:
        """One budget for all layers, but for those that have their own."""
        common = [latent for latent in latents if latent.sparsity is None]
        own = super().budgets(latents, context)[len(common) :]
        return [(common, self.final_sparsity), *own] if common else own

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Draw the first masks; then let layers exchange weights, where that is due."""
        if all("mask" in latent.state for latent in latents):
            due = [x for x in latents if x.stepped and (x.grad is not None or not self.needs_gradient)]
            changed = {}
            if due and self.is_due(context):
                changed = dict(zip([latent.name for latent in due], self.exchange(due, context), strict=True))
            return [changed.get(latent.name, {"mask": latent.mask}) for latent in latents]
        shares = [share or 0.0 for _, share in super().budgets(latents, context)]
        return [
            {"mask": latent.state["mask"] if "mask" in latent.state else random_mask(latent, share, context)}
            for latent, share in zip(latents, shares, strict=True)
        ]
