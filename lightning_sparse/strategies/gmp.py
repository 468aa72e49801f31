"""GMP: gradual magnitude pruning, the baseline."""

from collections.abc import Callable
from typing import Literal

from lightning_sparse.engine.callback import SparseTraining

__all__ = ["GMP"]


class GMP(SparseTraining):
    r"""Prune the smallest weights step by step along a cubic ramp, then train what is left.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    The mask :math:`m` keeps the largest magnitudes. It is taken anew every ``update_every_n_steps`` steps from
    ``start`` to ``end`` and then stays. Pruned weights are set to zero and do not come back.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; reached exactly.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        initial_sparsity: Sparsity before ``start``, in ``[0, 1)``.
        schedule: Shape of the ramp; cubic in the paper.
        distribution: ``"uniform"``, the same sparsity in each layer, as in the paper, or ``"global"``.
        update_every_n_steps: Optimizer steps between new masks; 100 to 1000 in the paper.
        targets: Patterns of the weights to treat, see :func:`~lightning_sparse.engine.targets.find_targets`.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` (a budget of its own) or None (stay dense).
        log_layers: Also log the sparsity of every weight.
        verbose: Print a table of the targets before training and a summary after it.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        Masks are updated at the multiples of ``update_every_n_steps`` and once more at ``end``, so that the target is
        reached exactly; several published ports stop one update short of it.

    References:
        Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
        https://arxiv.org/abs/1710.01878.

    Example:
        >>> GMP(sparsity=0.8, update_every_n_steps=200).final_sparsity
        0.8
    """

    paper = "Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878"
    keeps_latent = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0.2,
        end: int | float = 0.8,
        initial_sparsity: float = 0.0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["global", "uniform"] = "uniform",
        update_every_n_steps: int = 100,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict[str, float] | None] | None = None,
        log_layers: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=end,
            initial_sparsity=initial_sparsity,
            schedule=schedule,
            distribution=distribution,
            projection="hard",
            gradient="masked",
            freeze=end,
            update_every_n_steps=update_every_n_steps,
            targets=targets,
            ignore=ignore,
            overrides=overrides,
            log_layers=log_layers,
            verbose=verbose,
        )
