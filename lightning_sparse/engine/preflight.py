"""What is refused before training starts, with every weight as it was."""

from collections.abc import Iterable, Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS, Optimizer

from lightning_sparse.engine.compact import ELEMENTWISE
from lightning_sparse.engine.targets import Target
from lightning_sparse.functional import count_nonzeros

__all__ = ["check_optimizers", "check_overlap", "check_trainer", "check_weights"]


def check_trainer(method: str, trainer: pl.Trainer) -> None:
    """Refuse a Trainer of the package ``pytorch_lightning``, and strategies that keep the weights elsewhere."""
    if pl.Trainer not in type(trainer).__mro__:
        raise MisconfigurationException(
            "Expected the Trainer to be a `lightning.pytorch.Trainer`, but got a"
            f" `{type(trainer).__module__}.{type(trainer).__name__}`. Write `import lightning as L`."
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
        raise MisconfigurationException(
            f"`{method}` cannot train with `{type(trainer.strategy).__name__}`, which keeps the weights in"
            " flat tensors of its own. Use `ModelParallelStrategy` (FSDP2), `strategy='ddp'` or one device."
        )


def check_optimizers(
    method: str, optimizers: Iterable[Optimizer], verdicts: Iterable[Target], *, compact: bool
) -> None:
    """Refuse optimizers that evaluate the model more than once a step, or whose state cannot be ``compact``."""
    optimizers, targets = list(optimizers), {verdict.parameter for verdict in verdicts if verdict.treated}
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            f"`{method}` cannot train with `LBFGS`, which evaluates the model more than once a step."
            " Use an optimizer that evaluates it once, such as SGD or AdamW."
        )
    for optimizer in optimizers if compact else ():
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if type(optimizer) not in ELEMENTWISE and held & targets:
            raise MisconfigurationException(
                f"`{method}` cannot keep a compact state of `{type(optimizer).__name__}`, which may look at all entries"
                f" of a weight at once. Use {', '.join(kind.__name__ for kind in ELEMENTWISE[:-1])} or"
                f" {ELEMENTWISE[-1].__name__} of torch.optim, or leave out `compact_optimizer_state`."
            )


def check_weights(method: str, verdicts: Sequence[Target]) -> None:
    """Refuse a model without targets, or with weights that do not exist yet or are not finite."""
    for verdict in verdicts:
        if verdict.reason == "not initialised":
            raise MisconfigurationException(
                f"`{method}` cannot judge `{verdict.name}`, which is not initialised."
                " Run the model once before `fit`, for example in `configure_model`."
            )
        if verdict.treated and int(count_nonzeros([torch.isfinite(verdict.parameter)])) < verdict.parameter.numel():
            raise ValueError(f"Expected weight `{verdict.name}` to be finite, but it has NaN or infinite entries.")
    if not any(verdict.treated for verdict in verdicts):
        raise MisconfigurationException(
            f"`{method}` has no trainable target: "
            + "; ".join(sorted({f"{verdict.name}: {verdict.reason}" for verdict in verdicts})[:8])
            + ". Choose weights with `targets`."
        )


def check_overlap(method: str, verdicts: Sequence[Target], other: str, other_verdicts: Sequence[Target]) -> None:
    """Refuse two callbacks on the same weights."""
    mine, theirs = ({v.name for v in some if v.treated} for some in (verdicts, other_verdicts))
    if mine & theirs:
        raise MisconfigurationException(
            f"`{method}` and `{other}` both target {sorted(mine & theirs)[:4]}."
            " Give each its own `targets` or `ignore`."
        )
