"""A checkpoint callback that lets only sparse models compete for "best"."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_sparse.engine.callback import SparseTraining
from lightning_sparse.engine.checks import check_fraction

__all__ = ["SparseModelCheckpoint"]


class SparseModelCheckpoint(ModelCheckpoint):
    """Save the best models among those that have reached their sparsity.

    A plain ``ModelCheckpoint`` tends to find that the best model is the dense one from before pruning. This one ignores
    the monitored quantity until every sparse-training callback has reached its target. What ``save_last`` and
    ``monitor=None`` save is not affected.

    Args:
        min_sparsity: Sparsity over the targeted weights below which a model does not compete, in ``[0, 1]``. Needed
            with methods that have no budget of their own.
        **kwargs: Arguments of :class:`~lightning.pytorch.callbacks.ModelCheckpoint`.

    Raises:
        ValueError: If ``min_sparsity`` lies outside ``[0, 1]``.

    Example:
        >>> SparseModelCheckpoint(monitor="val_acc", mode="max", save_top_k=1).monitor
        'val_acc'
    """

    def __init__(self, *, min_sparsity: float = 0.0, **kwargs: Any) -> None:
        check_fraction("min_sparsity", min_sparsity, one=True)
        super().__init__(**kwargs)
        self.min_sparsity = min_sparsity

    @override
    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether a model with this value of the monitored quantity is among the best."""
        methods = [callback for callback in trainer.callbacks if isinstance(callback, SparseTraining)]  # type: ignore[attr-defined]
        sparse_enough = all(m.target_reached and m.sparsity >= self.min_sparsity for m in methods)
        return sparse_enough and super().check_monitor_top_k(trainer, current)
