"""Steps the learnable tensors of a method (thresholds, scores)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sparse.engine.latent import Latent
from lightning_sparse.functional.sharding import spread, whole

__all__ = ["Learner"]


class Learner:
    """An optimizer that follows, at every step, the settings with which the host optimizer treats the weight.

    Direction (``maximize``) and, unless the method has its own, learning rate are those of the weight's parameter
    group. SGD has momentum, dampening and Nesterov flag of the host if that is SGD, else momentum 0.9. Weight decay is
    the method's own.

    Args:
        latents: Their learnable tensors are stepped.
        weight_decay: L2 penalty, added to the gradient.
        kind: SGD or Adam.
    """

    def __init__(
        self, latents: Iterable[Latent], weight_decay: float = 0.0, kind: Literal["adam", "sgd"] = "sgd"
    ) -> None:
        self._groups: dict[str, dict[str, Any]] = {}
        for latent in latents:
            for key, tensor in latent.learned.items():
                self._groups[f"{latent.name}/{key}"] = {"params": [tensor]}
        groups = list(self._groups.values())
        self._optimizer: torch.optim.Optimizer | None = None
        if groups and kind == "adam":
            self._optimizer = torch.optim.Adam(groups, lr=0.0, weight_decay=weight_decay)
        elif groups:
            self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay)

    def step(
        self,
        hosts: Iterable[tuple[Latent, dict[str, Any]]],
        host: torch.optim.Optimizer,
        learning_rate: Callable[[Mapping[str, Any]], float],
    ) -> None:
        """Step the tensors that have a gradient and whose weights still have one.

        Args:
            hosts: The latents to step, each with the parameter group in which its weight lives.
            host: The optimizer that has just stepped these weights.
            learning_rate: Tells that of what is learned for the weights in such a group.
        """
        if self._optimizer is None:
            return
        for latent, group in hosts:
            for key, tensor in latent.learned.items():
                if latent.weight.grad is None:  # dropped on purpose, as by who skips a step after NaN
                    tensor.grad = None
                own = self._groups[f"{latent.name}/{key}"]
                own.update(lr=learning_rate(group), maximize=group.get("maximize", False))
                if isinstance(host, torch.optim.SGD) and "nesterov" in own:
                    own.update({k: group[k] for k in ("momentum", "dampening", "nesterov")})
        self._optimizer.step()
        self._optimizer.zero_grad()

    def clip(self, value: float | None, algorithm: str | None) -> None:
        """Limit the gradients as the Trainer limits those of the model, which are clipped by a norm of their own.

        Args:
            value: Largest norm, or largest entry; None or 0 for no limit.
            algorithm: ``"norm"`` (None is the same) or ``"value"``.
        """
        heard = [p for group in self._groups.values() for p in group["params"] if p.grad is not None]
        if heard and value and algorithm == "value":
            torch.nn.utils.clip_grad_value_(heard, value)
        elif heard and value:
            torch.nn.utils.clip_grad_norm_(heard, value)

    def forget(self) -> None:
        """Drop the gradients of a step that did not take place."""
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer remembers, by name."""
        if self._optimizer is None:
            return {}
        slots = {name: self._optimizer.state[group["params"][0]] for name, group in self._groups.items()}
        return {
            name: {key: whole(tensor) for key, tensor in state.items() if tensor is not None}
            for name, state in slots.items()
        }

    def load_state_dict(self, slots: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what the optimizer remembers."""
        for name, state in slots.items():
            tensor = self._groups[name]["params"][0]
            assert self._optimizer is not None
            for key, slot in state.items():
                # The number of steps of Adam stays where it is, on the CPU.
                shaped = slot.shape == tensor.shape and key != "step"
                self._optimizer.state[tensor][key] = spread(slot.to(tensor.device), tensor) if shaped else slot.clone()
