"""A random mask that stays as it is, the baseline."""

from typing import Literal

from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse

__all__ = ["StaticSparsity"]


class StaticSparsity(SparseToSparse):
    r"""A random mask that stays as it is.

    .. math:: w = m \odot \theta, \qquad \partial L / \partial \theta = m \odot \partial L / \partial w

    Args:
        sparsity: Fraction of zeros among the targeted weights, in ``[0, 1)``.
        distribution: How the budget is split between the layers, see
            :class:`~lightning_sparse.engine.callback.SparseTraining`.
        seed: Of the random numbers.
        targets: Patterns of the weights to treat, see :func:`~lightning_sparse.engine.targets.find_targets`.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` (a budget of its own) or None (stay dense).
        log_layers: Also log the sparsity of every weight.
        verbose: Print a table of the targets before training and a summary after it.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Example:
        >>> StaticSparsity(sparsity=0.9, distribution="erk").final_sparsity
        0.9
    """

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Literal["er", "erk", "uniform"] = "erk",
        seed: int = 0,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict[str, float] | None] | None = None,
        log_layers: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            sparsity,
            distribution=distribution,
            end=0.0,
            seed=seed,
            targets=targets,
            ignore=ignore,
            overrides=overrides,
            log_layers=log_layers,
            verbose=verbose,
        )
