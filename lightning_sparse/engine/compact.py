"""Optimizer state of the kept weights only, where the mask stays as it is."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse.engine.latent import Latent
from lightning_sparse.functional.sharding import is_sharded, like, local

__all__ = ["ELEMENTWISE", "CompactState"]

# What these do to an entry depends on nothing but that entry. A subclass may look at all of them, as LARS does.
ELEMENTWISE = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)

Slots = dict[str, Any]


class CompactState:
    """Holds the state of optimizers without its pruned entries, but while they step.

    A pruned entry has no gradient, is zero before each step and again after it, so that nobody asks what an optimizer
    remembers of it. The state is full while an optimizer steps, in its ``state_dict``, and after :meth:`release`.
    """

    def __init__(self) -> None:
        self._masks: dict[Tensor, Tensor] = {}
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}

    def follow(self, optimizers: Collection[Optimizer], latents: Iterable[Latent]) -> None:
        """From now on hold what these optimizers, and no others, remember of these weights without pruned entries."""
        if self._handles.keys() != set(optimizers):
            self.release()
            for optimizer in optimizers:
                self._handles[optimizer] = [
                    optimizer.register_step_pre_hook(self._before_step),
                    optimizer.register_step_post_hook(lambda optimizer, *_: self._compact(optimizer)),
                    optimizer.register_state_dict_post_hook(self._fill),
                ]
        self._masks = {latent.weight: latent.mask for latent in latents}
        for optimizer in optimizers:  # perhaps one that a checkpoint was just loaded into
            self._compact(optimizer)

    def release(self) -> None:
        """Leave full states and no hooks."""
        for optimizer, handles in self._handles.items():
            self._expand(optimizer)
            for handle in handles:
                handle.remove()
        self._handles.clear()
        self._masks.clear()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Expand as late as possible: Lightning runs forward and backward, and clips, in the closure of the step."""
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._expand(optimizer)
            return None

        def then_expand() -> Any:
            loss = closure()
            self._expand(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": then_expand}

    def _compact(self, optimizer: Optimizer) -> None:
        for weight, slots in self._slots(optimizer):
            mask = local(self._masks[weight])
            for key, slot in slots.items():
                if _is_full(slot, weight):
                    slots[key] = local(slot)[mask]

    def _expand(self, optimizer: Optimizer) -> None:
        for weight, slots in self._slots(optimizer):
            for key, slot in slots.items():
                slots[key] = self._full(slot, weight)

    def _fill(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Give whoever saves the full state, and leave the state that is in use."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = {
            index: {key: self._full(slot, weights[index]) for key, slot in slots.items()}
            if isinstance(index, int) and weights[index] in self._masks
            else slots
            for index, slots in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def _slots(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Slots]]:
        """What an optimizer remembers of each weight that is followed."""
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight in self._masks and weight in optimizer.state:
                    yield weight, optimizer.state[weight]

    def _full(self, slot: Any, weight: Tensor) -> Any:
        """A slot in the shape and memory format of its weight, zero where that is pruned."""
        if not isinstance(slot, Tensor) or slot.ndim != 1 or _is_full(slot, weight):
            return slot
        full = torch.zeros_like(local(weight), dtype=slot.dtype)
        return like(full.masked_scatter_(local(self._masks[weight]), slot), weight)


def _is_full(slot: Any, weight: Tensor) -> bool:
    return isinstance(slot, Tensor) and slot.shape == weight.shape and is_sharded(slot) == is_sharded(weight)
