"""Steps the learnable tensors of a method (thresholds, scores)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.engine.latent import Latent
from lightning_sparse.functional.sharding import spread, whole

__all__ = ["Learner"]


class Learner:
    """SGD that follows, at every step, the settings with which the host optimizer treats the weight.

    Learning rate and direction (``maximize``) are those of the weight's parameter group. Momentum, dampening and
    Nesterov flag are the host's if it is SGD, else momentum 0.9. Weight decay is the method's own.

    Args:
        latents: Their learnable tensors are stepped.
        weight_decay: L2 penalty, added to the gradient.
    """

    def __init__(self, latents: Iterable[Latent], weight_decay: float = 0.0) -> None:
        self._groups: dict[str, dict[str, Any]] = {}
        for latent in latents:
            for key, tensor in latent.learned.items():
                self._groups[f"{latent.name}/{key}"] = {"params": [tensor]}
        groups = list(self._groups.values())
        self._sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay) if groups else None

    def step(self, hosts: Iterable[tuple[Latent, dict[str, Any]]], host: torch.optim.Optimizer) -> None:
        """Step the tensors that have a gradient and whose weights still have one.

        Args:
            hosts: The latents to step, each with the parameter group in which its weight lives.
            host: The optimizer that has just stepped these weights.
        """
        if self._sgd is None:
            return
        for latent, group in hosts:
            for key, tensor in latent.learned.items():
                if latent.weight.grad is None:  # dropped on purpose, as by who skips a step after NaN
                    tensor.grad = None
                own = self._groups[f"{latent.name}/{key}"]
                own.update(lr=float(group["lr"]), maximize=group.get("maximize", False))
                if isinstance(host, torch.optim.SGD):
                    own.update({k: group[k] for k in ("momentum", "dampening", "nesterov")})
        self._sgd.step()
        self._sgd.zero_grad()

    def forget(self) -> None:
        """Drop the gradients of a step that did not take place."""
        if self._sgd is not None:
            self._sgd.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum buffers by name."""
        if self._sgd is None:
            return {}
        buffers = {
            name: self._sgd.state[group["params"][0]].get("momentum_buffer") for name, group in self._groups.items()
        }
        return {name: whole(buffer) for name, buffer in buffers.items() if buffer is not None}

    def load_state_dict(self, buffers: dict[str, Tensor]) -> None:
        """Restore the momentum buffers."""
        for name, buffer in buffers.items():
            tensor = self._groups[name]["params"][0]
            assert self._sgd is not None
            self._sgd.state[tensor]["momentum_buffer"] = spread(buffer.to(tensor.device), tensor)
