"""Whole training configurations as data, and how each is trained."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from lightning_sparse import SparseTraining
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.models import Classifier, Loader, ResumableLoader, make_trainer, snapshot
from tests.helpers.strategies import SETTINGS

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.8, nesterov=True, foreach=True),
    "ascent": functools.partial(torch.optim.SGD, lr=0.002, momentum=0.5, maximize=True, foreach=False),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, foreach=False),
    "adam-fused": functools.partial(torch.optim.Adam, lr=0.01, weight_decay=1e-2, fused=True),
    "amsgrad": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.002, momentum=0.5, centered=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.02, lr_decay=0.01),
}
SCHEDULERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "step": ("step", lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)),
    "warmup": ("step", lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 4))),
    "cosine": ("epoch", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)),
}
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
PRECISIONS = ["32-true", "bf16-mixed", *DTYPES]


def staircase(progress: float) -> float:
    """A user's schedule that jumps."""
    return math.floor(2.9 * progress + 0.1) / 3


def detour(progress: float) -> float:
    """A user's schedule that overshoots its end and comes back."""
    return min(1.0, 2.0 * progress) if progress < 0.8 else 0.9


# By name, so that what is printed can be pasted into a test.
USER_SCHEDULES = {"staircase": staircase, "detour": detour}


@dataclass(frozen=True)
class Config:
    """One way to train one model; the defaults are the plainest.

    Attributes:
        kwargs: Arguments of the strategy on top of those of its setting.
        manual: Number of optimizers that the model steps itself; 0 for automatic optimization.
        compiled: Backend of ``torch.compile``.
        sized: Whether the data loader has a length.
        epochs: ``max_epochs``, -1 for none.
        steps: ``max_steps``, -1 for none. Without either a callback stops after five batches.
        validate: Batches between validations, 0 for none, None for every epoch.
        example: Whether FLOPs are counted with an example input, or in the first batch.
    """

    architecture: str = "mlp"
    strategy: str = "SparseTraining"
    kwargs: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    groups: bool = False
    scheduler: str | None = None
    precision: str = "32-true"
    accumulate: int = 1
    clip: tuple[str, float] | None = None
    manual: int = 0
    compiled: str | None = None
    channels_last: bool = False
    batches: int = 3
    sized: bool = True
    epochs: int = 2
    steps: int = -1
    validate: int | None = 0
    example: bool = True

    def build(self, **changes: Any) -> SparseTraining:
        """Make the callback."""
        return SETTINGS[self.strategy].build(**self._resolve({**self.kwargs, **changes}))

    def build_dense(self) -> SparseTraining:
        """Make one that prunes nothing and passes the gradient on as it is."""
        dense = SETTINGS[self.strategy].dense
        kwargs = {k: v for k, v in self.kwargs.items() if k not in {*dense, "initial_sparsity"}}
        overrides = {k: v and {"sparsity": 0.0} for k, v in kwargs.pop("overrides", {}).items()}
        return self.build_with(**{**kwargs, **dense, "overrides": overrides})

    def build_with(self, **kwargs: Any) -> SparseTraining:
        """Make a callback of the same class with these arguments only."""
        return SETTINGS[self.strategy].method(verbose=False, **self._resolve(kwargs))

    def _resolve(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        schedule = kwargs.get("schedule", "cubic")
        return kwargs | ({"schedule": USER_SCHEDULES[schedule]} if schedule in USER_SCHEDULES else {})

    @property
    def openended(self) -> bool:
        return self.epochs == self.steps == -1

    @property
    def length(self) -> float:
        """Epochs that the Trainer's flags allow; 1 where only steps can be counted."""
        if not self.sized and self.steps > 0:
            return 1.0
        epochs = math.inf if self.epochs == -1 else float(self.epochs)
        if self.steps > 0:
            window = 1 if self.manual else self.accumulate
            batches, steps = 0.0, self.steps / max(1, self.manual)
            while steps > 0:  # window by window; the last of an epoch may be short
                left = self.batches - batches % self.batches
                batches += min(window, left) * min(1.0, steps)
                steps -= 1
            epochs = min(epochs, batches / self.batches)
        return epochs

    def moment(self, name: str) -> float | None:
        """``start``, ``end`` or ``freeze`` in epochs."""
        value = getattr(self.build(), name)
        return value * self.length if isinstance(value, float) and value else value

    def refusal(self) -> str | None:
        """What the callback must say to these flags; None if it must train."""
        callback = self.build()
        moments = [("start", callback.start), ("end", callback.end), ("freeze", callback.freeze)]
        for name, value in moments:
            if value and isinstance(value, float) and self.openended:
                return f"Expected argument `{name}` to be an int .epoch., as training is open-ended, but got {value}"
            if value and isinstance(value, int) and not self.sized and self.steps > 0:
                return f"Expected argument `{name}` to be a float .*the data loader is unknown, but got {value}"
        if hasattr(callback, "alpha") and self.openended:
            return "Gradient Annealing decays `alpha` over the whole training, but training is open-ended"
        epochs = [self.moment(name) for name, value in moments if value is not None]
        if epochs != sorted(epochs):
            return "Expected `start` <= `end` <= `freeze`, but they fall `start` on"
        if hasattr(callback, "sparse_phase") and self.openended:
            return "Expected argument `sparse_phase` to be an int .epoch., as training is open-ended"
        return None

    def make_model(self) -> "Subject":
        model = Subject(self)
        model.to(DTYPES.get(self.precision, torch.float32))  # Lightning does the same; so that tensors can be compared
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compiled:
            model.net.compile(backend=self.compiled)
        return model

    def make_trainer(self, *callbacks: Callback, **flags: Any) -> L.Trainer:
        accumulated = {} if self.manual else {"accumulate_grad_batches": self.accumulate}
        if self.clip and not self.manual:
            accumulated |= {"gradient_clip_algorithm": self.clip[0], "gradient_clip_val": self.clip[1]}
        if self.openended:
            callbacks = (*callbacks, StopAfter(5))
        if self.validate == 0:
            accumulated |= {"limit_val_batches": 0}
        elif self.validate is not None:
            accumulated |= {"val_check_interval": self.validate, "check_val_every_n_epoch": None}
        return make_trainer(
            *callbacks,
            precision=self.precision,
            max_epochs=self.epochs,
            max_steps=self.steps,
            **accumulated | flags,
        )

    def fit(self, model: "Subject", *callbacks: Callback, ckpt_path: str | None = None, **flags: Any) -> L.Trainer:
        """Train from the same seed on the same batches."""
        trainer = self.make_trainer(*callbacks, **flags)
        torch.manual_seed(1)
        loader = (ResumableLoader if self.sized else Unsized)(batches=self.batches)
        try:
            trainer.fit(model, loader, Loader(seed=1, batches=1), ckpt_path=ckpt_path)
        finally:
            if self.compiled:
                torch._dynamo.reset()
        return trainer

    def train(self, *callbacks: Callback, ckpt_path: str | None = None, **flags: Any) -> dict[str, Any]:
        """Train a new model; return all that must be the same at the end."""
        model = self.make_model()
        trainer = self.fit(model, *callbacks, ckpt_path=ckpt_path, **flags)
        return outcome(model, trainer)


def outcome(model: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
    sparse = [callback for callback in trainer.callbacks if isinstance(callback, SparseTraining)]
    sparse.sort(key=lambda callback: callback.state_key)
    return {
        "model": snapshot(model),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": [callback.state_dict() for callback in sparse],
        "metrics": [callback.metrics() for callback in sparse],
        "random": torch.get_rng_state(),
    }


class Subject(Classifier):
    """The model of a configuration."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        super().__init__(ARCHITECTURES[config.architecture]())
        self.config, self.automatic_optimization = config, not config.manual
        if config.example:
            self.example_input_array = torch.zeros(2, 1, 6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.compute_loss(batch)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.config.accumulate)
        if (batch_idx + 1) % self.config.accumulate == 0 or self.trainer.is_last_batch:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                if self.config.clip:
                    algorithm, bound = self.config.clip
                    self.clip_gradients(optimizer, gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
                optimizer.step()
                optimizer.zero_grad()
            schedulers = self.lr_schedulers() or []
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()
        return None

    def configure_optimizers(self) -> Any:
        make = OPTIMIZERS[self.config.optimizer]
        parameters = [p for p in self.parameters() if p.requires_grad]
        parts = [parameters[i :: max(1, self.config.manual)] for i in range(max(1, self.config.manual))]
        optimizers = []
        for part in parts:
            groups = [{"params": part}]
            if self.config.groups:
                flat = [p for p in part if p.ndim < 2] or part[:1]
                rest = [p for p in part if all(p is not q for q in flat)]
                groups = [{"params": flat, "lr": 0.5 * make.keywords["lr"]}, {"params": rest, "weight_decay": 0.05}]
            optimizers.append(make([group for group in groups if group["params"]]))
        if self.config.scheduler is None:
            return optimizers
        interval, schedule = SCHEDULERS[self.config.scheduler]
        return optimizers, [{"scheduler": schedule(optimizer), "interval": interval} for optimizer in optimizers]


class Unsized(Loader):
    """The same batches, of unknown number."""

    __len__ = None


class StopAfter(Callback):
    """Ends an open-ended training."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        trainer.should_stop = trainer.should_stop or done >= self.batches


class SaveOnce(Checkpoint):
    """Saves after one batch with an optimizer step, or after one epoch.

    Args:
        moment: Kind of the moment and how many of its kind come before it.
    """

    path = "stopped.ckpt"

    def __init__(self, moment: tuple[str, int]) -> None:
        (self.kind, self.left), self.step, self.saved = moment, 0, False

    def count(self, kind: str, trainer: L.Trainer) -> None:
        if kind == self.kind:
            if self.left == 0:
                trainer.save_checkpoint(self.path)
                self.saved = True
            self.left -= 1

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.count("step", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.count("epoch", trainer)
