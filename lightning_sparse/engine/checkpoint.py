"""Checkpoints: a callback that lets only sparse models compete for "best", and one file out of many shards."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from typing_extensions import override

from lightning_sparse.engine.callback import SparseTraining
from lightning_sparse.engine.checks import check_fraction

__all__ = ["SparseModelCheckpoint", "consolidate_checkpoint"]

# What Lightning writes beside the shards.
_METADATA = "meta.pt"


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


def consolidate_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Turn a checkpoint that ``ModelParallelStrategy`` has written in shards into an ordinary one.

    Any strategy resumes from the result, and ``load_from_checkpoint`` reads it. All of it must fit into memory.

    Args:
        folder: The sharded checkpoint, a folder.
        file: Where to write the ordinary one.

    Raises:
        ValueError: If ``folder`` is no such checkpoint.

    Example:
        >>> consolidate_checkpoint("last.ckpt", "whole.ckpt")
        Traceback (most recent call last):
        ValueError: Expected argument `folder` to be a checkpoint in shards, a folder, but got 'last.ckpt'.
    """
    folder = Path(folder)
    if not (folder / _METADATA).is_file():
        raise ValueError(f"Expected argument `folder` to be a checkpoint in shards, a folder, but got '{folder}'.")
    with TemporaryDirectory() as scratch:
        dcp_to_torch_save(folder, Path(scratch) / "shards")
        shards = torch.load(Path(scratch) / "shards", weights_only=True)
    checkpoint = torch.load(folder / _METADATA, weights_only=True)
    checkpoint["state_dict"] = shards.pop("state_dict")
    checkpoint["optimizer_states"] = [_number(shards[f"optimizer_{i}"]) for i in range(len(shards))]
    torch.save(checkpoint, file)


def _number(state: dict[str, Any]) -> dict[str, Any]:
    """Let an optimizer's state refer to parameters by number, as ``Optimizer.state_dict`` does, instead of by name."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    groups = [{**group, "params": [names.index(name) for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names.index(name): tensors for name, tensors in state["state"].items()}, "param_groups": groups}
