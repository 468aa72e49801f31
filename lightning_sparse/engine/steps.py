"""Being told of the steps of optimizers."""

from collections import Counter
from collections.abc import Callable, Collection

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepWatch"]


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
