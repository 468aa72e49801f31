"""Where the callback stands among the others: before and behind them."""

from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

__all__ = ["First", "callbacks", "line_up"]


class Watched(Protocol):
    """What is told before all other callbacks are."""

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch begins, or its first batch."""

    def end_noise(self) -> None:
        """No batch is being trained on."""

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch has been trained on."""

    def interrupt(self, trainer: pl.Trainer) -> None:
        """Training is interrupted."""


class First(pl.Callback):
    """Stands before all other callbacks, so that none of them ever finds latents in the model.

    Args:
        hooks: What stands behind them.
    """

    def __init__(self, hooks: Watched) -> None:
        self.hooks = hooks

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a training epoch begins, but for one that is resumed from the last batch of the one before."""
        self.hooks.start_epoch(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch begins."""
        if batch_idx == 0:
            self.hooks.start_epoch(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends."""
        self.hooks.end_batch(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a training epoch ends, even if a batch was skipped after it had started."""
        self.hooks.end_noise()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when training is interrupted."""
        self.hooks.interrupt(trainer)


def callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks of a Trainer, which Lightning does not declare."""
    found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def line_up(trainer: pl.Trainer, first: pl.Callback, last: pl.Callback) -> None:
    """Put one callback before all others and one behind them, before the checkpoints.

    So whatever the others put into the model or into a checkpoint (averaged weights, for one) is made sparse, in
    whichever order the user lists them.
    """
    others = [callback for callback in callbacks(trainer) if callback not in (first, last)]
    end = next((i for i, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
    trainer.callbacks = [first, *others[:end], last, *others[end:]]  # type: ignore[attr-defined]
