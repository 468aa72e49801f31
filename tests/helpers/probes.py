"""Callbacks and optimizers that look into the model at every moment of training."""

from collections import Counter
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from lightning_sparse import SparseTraining
from tests.helpers.assertions import assert_sparse

# Hooks while a batch is trained on, when the network may hold noise.
_DURING = {"on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"}
_BEFORE = {"setup", "on_fit_start", "on_sanity_check_start", "on_train_start"}  # the weights may still be the user's


class Probe(Callback):
    """Checks in every hook that the model is sparse, and where the optimizer is about to step that it is not yet.

    Attributes:
        seen: How often each hook was called.
    """

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse, self.seen = sparse, Counter[str]()

    def look(self, hook: str, trainer: Any, model: Any) -> None:
        self.seen[hook] += 1
        if hook not in _BEFORE and self.sparse.targets and not (self.sparse.stochastic and hook in _DURING):
            assert_sparse(model, self.sparse)


class LateProbe(Probe, Checkpoint):
    """The same behind the sparse-training callback, which goes before checkpoints only."""

    def look(self, hook: str, trainer: Any, model: Any) -> None:
        if hook == "on_before_optimizer_step" or (self.sparse.stochastic and hook == "on_train_batch_start"):
            self.seen[hook] += 1
        else:
            super().look(hook, trainer, model)


def _make_hook(hook: str) -> Any:
    return lambda self, trainer, model, *args, **kwargs: self.look(hook, trainer, model)


HOOKS = [hook for hook in vars(Callback) if hook.startswith("on_")] + ["setup", "teardown"]
for _hook in HOOKS:
    setattr(Probe, _hook, _make_hook(_hook))


class ProbedSGD(torch.optim.SGD):
    """Looks at parameters and gradients between the closure and the update.

    Attributes:
        look: Called then, with nothing; set by the test.
        fail: Exception to raise and when: ``"before"`` or ``"after"`` the update.
    """

    look: Any = None
    fail: tuple[str, BaseException] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.look is not None:
            self.look()
        self._fail("before")
        super().step()
        self._fail("after")
        return loss

    def _fail(self, when: str) -> None:
        if self.fail is not None and self.fail[0] == when:
            raise self.fail[1]
