"""Where training stands, in epochs."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Clock"]


@dataclass(frozen=True)
class Clock:
    """Converts moments of training to epochs.

    With a data loader of unknown length the clock strikes whole epochs only; if ``max_steps`` ends the training, that
    counts as one epoch, and only fractions of training can be told.

    Attributes:
        epochs: Length of the whole training in epochs, infinite when open-ended.
        batches: Batches per epoch, infinite when unknown; where epochs cannot be told, steps of the whole training.
        sized: Whether epochs can be told.
    """

    epochs: float
    batches: float
    sized: bool = True

    @classmethod
    def of(cls, trainer: "pl.Trainer", max_epochs: int | None) -> "Clock":
        """Read the clock's face from the Trainer's flags."""
        batches, accumulated = float(trainer.num_training_batches), trainer.accumulate_grad_batches
        if math.isinf(batches) and trainer.max_steps > 0:
            return cls(1.0, float(trainer.max_steps), sized=False)
        epochs = math.inf if max_epochs in (None, -1) else float(max_epochs or 0)
        if trainer.max_steps > 0 and batches:
            steps = trainer.max_steps / max(1, len(trainer.optimizers))
            whole, rest = divmod(steps, math.ceil(batches / accumulated))
            epochs = min(epochs, whole + rest * accumulated / batches)
        return cls(epochs, batches)

    def position(self, epoch: int, batch: int, step: int) -> float:
        """Epochs so far.

        Args:
            epoch: Index of the current epoch.
            batch: Batches done in it.
            step: Optimizer steps done since training began, of all optimizers.
        """
        return epoch + batch / self.batches if self.sized else min(1.0, step / self.batches)

    def at(self, moment: int | float, argument: str) -> float:
        """Epochs at a moment given as an epoch (int) or as a fraction of training (float).

        Raises:
            MisconfigurationException: If the Trainer's flags do not determine that moment.
        """
        if not moment:
            return 0.0
        if isinstance(moment, float) and math.isinf(self.epochs):
            raise MisconfigurationException(
                f"Expected argument `{argument}` to be an int (epoch), as training is open-ended, but got {moment!r}."
                " Set `max_epochs` or `max_steps` in the Trainer, or give an epoch."
            )
        if isinstance(moment, int) and not self.sized:
            raise MisconfigurationException(
                f"Expected argument `{argument}` to be a float (fraction of training) because the length of the data"
                f" loader is unknown, but got {moment!r}."
            )
        return float(moment) if isinstance(moment, int) else moment * self.epochs

    def progress(self, position: float, start: float, end: float) -> float:
        """Progress over a window, in ``[0, 1]``; before it 0, from its end on 1."""
        if position >= end:
            return 1.0
        if position <= start:  # which may be the end
            return 0.0
        # Rounded, so that 0.55 * 100 epochs end with the 55th epoch and not one step later.
        return round((position - start) / (end - start), 12)
