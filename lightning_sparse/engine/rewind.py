"""Many trainings in one: what goes back when a round of training ends."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.sharding import is_sharded, local, spread, whole

__all__ = ["Rewinder", "Rounds"]


@dataclass(frozen=True)
class Rounds:
    """Trainings, one after the other: the first from its beginning, the others from epoch ``rewind_epoch`` of it.

    Attributes:
        number: How many, the first included.
        epochs: Length of the first in epochs; None to divide what the Trainer allows.
        rewind: What goes back between them: ``"weights"`` (and all else), ``"learning_rate"``, or nothing.
        rewind_epoch: Where to, in epochs of the first.
    """

    number: int
    epochs: int | None
    rewind: Literal["learning_rate", "weights"] | None
    rewind_epoch: int = 0

    def length(self, training: float) -> int:
        """Epochs of the first round, in a training of so many epochs.

        Raises:
            MisconfigurationException: If the Trainer's flags do not determine it, or leave too little.

        Example:
            >>> Rounds(3, None, "weights", rewind_epoch=1).length(10)
            4
        """
        if self.epochs is not None:
            return self.epochs
        if math.isinf(training):
            raise MisconfigurationException(
                "Expected argument `epochs_per_round` to be an int, as training is open-ended, but got None."
                " Set `max_epochs` in the Trainer, or give the epochs of a round."
            )
        length = int(training + (self.number - 1) * self.rewind_epoch) // self.number
        if length <= self.rewind_epoch:
            raise MisconfigurationException(
                f"Expected training to last at least {self.rewind_epoch + self.number} epochs, so that {self.number}"
                f" rounds go beyond epoch {self.rewind_epoch}, but got {training:g}. Raise `max_epochs` in the Trainer."
            )
        return length

    def ended(self, epoch: int, training: float) -> int:
        """Rounds that are over when an epoch begins, the last never.

        Example:
            >>> [Rounds(3, 4, "weights", rewind_epoch=1).ended(epoch, 10) for epoch in (0, 3, 4, 6, 7, 10)]
            [0, 0, 1, 1, 2, 2]
        """
        over = (epoch - self.rewind_epoch) // (self.length(training) - self.rewind_epoch)
        return min(max(0, over), self.number - 1)


class Rewinder:
    """Keeps what goes back, once, in the memory of the CPU (sharded tensors stay on their devices).

    Attributes:
        done: Rounds that are over.
    """

    def __init__(self) -> None:
        self.done = 0
        # Weights, settings of optimizers and schedulers as they were at the epoch to go back to; before it empty.
        self._kept: dict[str, Any] = {}
        # State of new optimizers, which is empty for most: they make it in their first step.
        self._new: list[dict[int, dict[str, Any]]] = []

    def begin(self, trainer: pl.Trainer, rounds: Rounds, training: float, restored: dict[str, Any] | None) -> None:
        """Start from new optimizers, or from what a checkpoint holds.

        Raises:
            MisconfigurationException: If a schedule cannot be repeated.
        """
        again = rounds.length(training) - rounds.rewind_epoch
        for config in trainer.lr_scheduler_configs if rounds.rewind is not None else ():
            if config.interval == "epoch" and again % config.frequency:
                raise MisconfigurationException(
                    f"Expected the {again} epochs between rewinds to be a multiple of the `frequency` of the scheduler"
                    f" {type(config.scheduler).__name__}, but got {config.frequency}. Step it every epoch."
                )
        if restored is not None:
            self.done, self._kept, self._new = restored["done"], restored["kept"], restored["new"]
            return
        self.done, self._kept = 0, {}
        self._new = [
            {
                index: {key: _keep(slot, cpu=False) for key, slot in optimizer.state[parameter].items()}
                for index, parameter in enumerate(_parameters(optimizer))
                if parameter in optimizer.state
            }
            for optimizer in trainer.optimizers
        ]

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule, rounds: Rounds, epoch: int) -> None:
        """Keep what goes back, at the epoch to which it does or, resumed without it, as soon as possible."""
        if self._kept or rounds.rewind is None or epoch < rounds.rewind_epoch or self.done >= rounds.number - 1:
            return
        self._kept = {
            "tensors": {name: _keep(tensor) for name, tensor in _tensors(module)} if rounds.rewind == "weights" else {},
            "groups": [
                [{key: copy.deepcopy(group[key]) for key in group if key != "params"} for group in groups]
                for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
            ],
            "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        }

    @torch.no_grad()
    def rewind(self, trainer: pl.Trainer, module: pl.LightningModule, rounds: Rounds) -> None:
        """Put back what goes back."""
        if rounds.rewind is None:
            return
        for name, tensor in _tensors(module) if rounds.rewind == "weights" else ():
            if name in self._kept["tensors"]:
                _put(self._kept["tensors"][name], tensor)
        for optimizer, groups in zip(trainer.optimizers, self._kept["groups"], strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                _set(group, copy.deepcopy(settings))
        if rounds.rewind == "weights":
            self._renew(trainer)
        for config, state in zip(trainer.lr_scheduler_configs, self._kept["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        if self.done == rounds.number - 1:
            self._kept = {}

    def _renew(self, trainer: pl.Trainer) -> None:
        for optimizer, new in zip(trainer.optimizers, self._new, strict=True):
            parameters = _parameters(optimizer)
            optimizer.state.clear()
            for index, slots in new.items():
                like = parameters[index]
                optimizer.state[like] = {
                    key: _spread(slot, like).clone() if isinstance(slot, Tensor) else slot
                    for key, slot in slots.items()
                }

    def state_dict(self) -> dict[str, Any]:
        """All that is kept; of sharded tensors the whole."""
        return {"done": self.done, "kept": _gather(self._kept), "new": _gather(self._new)}


def _tensors(module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, without the prefix that ``torch.compile`` inserts into names."""
    for named in (module.named_parameters(), module.named_buffers()):
        yield from ((name.replace("_orig_mod.", ""), tensor.detach()) for name, tensor in named)


def _set(group: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(group[key], Tensor):  # such as a learning rate that compiled code reads
            group[key].copy_(value)
        else:
            group[key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _keep(value: Any, *, cpu: bool = True) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", copy=True) if cpu and not is_sharded(value) else value.detach().clone()


def _put(kept: Tensor, tensor: Tensor) -> None:
    """Copy what was kept, whole or, like the tensor itself, in parts."""
    local(tensor).copy_(local(_spread(kept, tensor)))


def _spread(kept: Tensor, like: Tensor) -> Tensor:
    if is_sharded(kept) or kept.shape != like.shape:  # the number of steps stays where it is
        return kept
    return spread(kept.to(like.device), like)


def _gather(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _gather(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_gather(entry) for entry in value]
    return whole(value).cpu() if isinstance(value, Tensor) and is_sharded(value) else value
