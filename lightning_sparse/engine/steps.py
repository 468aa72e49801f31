"""Being told of the steps of optimizers, and which of them are none."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepWatch", "foresee", "has_skipped", "unscale"]


def foresee(scaler: Any, optimizer: Optimizer) -> tuple[bool, float]:
    """What a gradient scaler will make of the step that an optimizer is about to take.

    Args:
        scaler: That of the Trainer's precision; None without one.
        optimizer: Its gradients are there.

    Returns:
        Whether the step will be taken, and the factor that the gradients still carry. A fused kernel unscales them and
        finds overflows itself, so that only :func:`has_skipped` knows whether it took the step.
    """
    if not isinstance(scaler, GradScaler) or not scaler.is_enabled():
        return True, 1.0
    overflows = scaler._found_inf_per_device(optimizer)
    if not overflows and getattr(optimizer, "_step_supports_amp_scaling", False):
        return True, scaler.get_scale()
    # Without a loss there was nothing to unscale, and there will be no step.
    return bool(overflows) and not any(overflows.values()), 1.0


def unscale(scaler: Any, optimizer: Optimizer) -> None:
    """Unscale gradients and look for overflows now, where that has been left to a fused kernel."""
    if not isinstance(scaler, GradScaler) or not scaler.is_enabled() or scaler._found_inf_per_device(optimizer):
        return
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        scaler.unscale_(optimizer)


def has_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused kernel has just left everything as it was because a gradient was not finite."""
    return bool(getattr(optimizer, "found_inf", False))


class StepWatch:
    """Calls a function after every step of an optimizer, whoever steps it.

    In a subclass that calls ``super().step()`` the hooks of PyTorch fire twice; then the outer step counts.
    """

    def __init__(self) -> None:
        self._handles: dict[Optimizer, tuple[RemovableHandle, RemovableHandle]] = {}
        self._depth: Counter[Optimizer] = Counter()

    def follow(self, optimizers: Collection[Optimizer], after: Callable[[Optimizer], None]) -> None:
        """Watch these optimizers and no others."""
        self._depth.clear()  # of a step that failed
        if self._handles.keys() == set(optimizers):
            return
        self.release()

        def enter(optimizer: Optimizer, *_: object) -> None:
            self._depth[optimizer] += 1

        def leave(optimizer: Optimizer, *_: object) -> None:
            self._depth[optimizer] -= 1
            if self._depth[optimizer] == 0:
                after(optimizer)

        for optimizer in optimizers:
            self._handles[optimizer] = optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)

    def release(self) -> None:
        """Watch nothing."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        self._depth.clear()
