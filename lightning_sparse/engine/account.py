"""Bookkeeping of theoretical FLOPs while a model trains."""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.fsdp import FSDPModule

from lightning_sparse._untouched import untouched
from lightning_sparse.engine.targets import reshard
from lightning_sparse.flops import FlopCount, FlopRecorder

__all__ = ["Account", "batch_size", "replicas"]

# What a checkpoint keeps of a count.
_COUNTED = ("by_layer", "rest", "uncounted", "aliases")


class Account:
    """FLOPs per sample, counted once, and what training has cost so far.

    Attributes:
        flops: Dense count of the counted inputs, with the weight that causes each part; None before it is known.
        samples: Number of samples in the counted inputs.
        densities: Density of each weight in the last training batch.
        gradient_densities: Fraction of each weight gradient that the last training batch has computed.
    """

    def __init__(self) -> None:
        self.flops: FlopCount | None = None
        self.samples = 1
        self.densities: Mapping[str, float] = {}
        self.gradient_densities: Mapping[str, float] = {}
        self._spent = self._spent_dense = self._rate = 0.0
        self._recorder: FlopRecorder | None = None

    def count_example(self, trainer: pl.Trainer, module: pl.LightningModule, *, run: bool = False) -> None:
        """Count with ``module.example_input_array``, if there is one and nothing has been counted yet.

        Args:
            trainer: Moves the example to where the module is.
            module: Called on every rank.
            run: Whether to count layer by layer in a forward pass what cannot be traced as a whole.
        """
        example = module.example_input_array
        if example is None or self.flops is not None:
            return
        example = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(example))
        args, kwargs = (example if isinstance(example, tuple) else (example,)), {}
        if isinstance(example, Mapping):
            args, kwargs = (), dict(example)
        recorder = FlopRecorder(module)
        if any(isinstance(part, FSDPModule) for part in module.modules()) or not recorder.trace(module, args, kwargs):
            if not run:
                return
            with untouched(module), recorder:
                module(*args, **kwargs)
            reshard(module)
        self.samples, self.flops = batch_size(example), recorder.count()

    def open(self, module: pl.LightningModule) -> None:
        """Record the calls of the first training batch, if nothing has been counted yet."""
        if self.flops is None and self._recorder is None:
            self._recorder = FlopRecorder(module)
            self._recorder.__enter__()

    def close(self, batch: Any) -> bool:
        """Count what the batch called; whether that is news."""
        if self._recorder is None or self.flops is not None:
            return False
        self.samples, self.flops = batch_size(batch), self._recorder.count()
        self.abandon()
        if not self.flops.dense:
            rank_zero_warn(
                "No FLOPs were counted: the first training batch called no module of the LightningModule."
                " Set `example_input_array` to have them counted."
            )
        return True

    def abandon(self) -> None:
        """Remove what watches the module."""
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def price(self, densities: Mapping[str, float], gradient_densities: Mapping[str, float]) -> None:
        """Set what a training sample costs from now on."""
        self.densities, self.gradient_densities = densities, gradient_densities
        if self.flops is not None:
            self._rate = self.flops.training(densities, gradient_densities) / self.samples

    def spend(self, samples: int) -> None:
        """Book the training of some samples."""
        if self.flops is not None:
            self._spent += samples * self._rate
            self._spent_dense += samples * 3.0 * self.flops.dense / self.samples

    def metrics(self, densities: Mapping[str, float]) -> dict[str, float]:
        """The numbers that are logged; nothing before the count is known."""
        if self.flops is None or not self.flops.dense:
            return {}
        inference = self.flops.inference(densities)
        return {
            "flops/inference": inference / self.samples,
            "flops/inference_ratio": inference / self.flops.dense,
            "flops/training_total": self._spent,
            "flops/training_ratio": self._spent / self._spent_dense if self._spent_dense else 1.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """The count, which a resumed run does not repeat, and what has been spent."""
        state: dict[str, Any] = {"spent": self._spent, "spent_dense": self._spent_dense, "samples": self.samples}
        if self.flops is not None:
            state |= {key: getattr(self.flops, key) for key in _COUNTED}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        self._spent, self._spent_dense, self.samples = state["spent"], state["spent_dense"], state["samples"]
        if all(key in state for key in _COUNTED):
            self.flops = FlopCount(**{key: state[key] for key in _COUNTED})


def batch_size(batch: Any) -> int:
    """Samples in a batch, as Lightning sees them; 1 if it cannot tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return extract_batch_size(batch)
        except MisconfigurationException:
            return 1


def replicas(trainer: pl.Trainer) -> int:
    """Ranks that train on data of their own; with tensor parallelism several share theirs."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size))
