"""A callback that keeps in one small file what happens to the masks of a run."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.engine.account import batch_size
from lightning_sparse.engine.callback import SparseTraining
from lightning_sparse.engine.order import callbacks
from lightning_sparse.functional.sharding import whole
from lightning_sparse.reports.report import PER_LAYER
from lightning_sparse.reports.runs import RunFile

__all__ = ["RunRecorder"]


class RunRecorder(pl.Callback):
    """Record a run: masks, sparsity, thresholds, FLOPs and what is logged, before training and after each epoch.

    Stands beside any strategies, in any order, or alone, where the training is dense. The file holds no weights;
    :func:`~lightning_sparse.reports.read_run` reads it, and :func:`~lightning_sparse.reports.write_report` shows it. A
    crash loses at most what the epoch at hand would have added. A run that is resumed from a checkpoint goes on in its
    file, without what it does again; into another one it takes along what is in the first. A run that starts anew
    replaces its file. The format is described in ``lightning_sparse.reports.runs``.

    Args:
        path: The file, by custom ``*.jsonl``; None for ``run.jsonl`` in the folder that the logger has for the
            run.
        masks: Whether to record the masks, and what is dropped and grown. They take about 0.03 bytes per weight and
            epoch where 3 % of them change.

    Raises:
        ValueError: If there is a file at ``path`` that is no record of a run.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import ST3
        >>> from lightning_sparse.reports import read_run
        >>> trainer = L.Trainer(
        ...     max_epochs=2,
        ...     limit_train_batches=4,
        ...     limit_val_batches=0,
        ...     callbacks=[ST3(0.75, end=1, verbose=False), RunRecorder("st3.jsonl")],
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> read_run("st3.jsonl").total_sparsity
        {0: 0.0, 1: 0.75, 2: 0.75}
    """

    def __init__(self, path: str | Path | None = None, *, masks: bool = True) -> None:
        self.path, self.masks = path, masks
        self._file: RunFile | None = None
        self._earlier: Path | None = None
        # Samples trained on, and how many of them each weight has cost as much as if it were dense.
        self._samples, self._worth = 0, dict[str, float]()
        self._seen: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins. Forgets the fit before."""
        if stage == TrainerFn.FITTING:
            self._file, self._earlier, self._samples, self._worth, self._seen = None, None, 0, {}, {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins, after all set-ups. Steps behind those whose work is recorded."""
        others = [callback for callback in callbacks(trainer) if callback is not self]
        end = next((i for i, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
        trainer.callbacks = [*others[:end], self, *others[end:]]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins. Opens the file and records what training starts from."""
        if trainer.is_global_zero:
            path = Path(_folder(trainer), "run.jsonl") if self.path is None else Path(self.path)
            self._file = RunFile(path, self._header(trainer))
            self._file.open(trainer.global_step, self._earlier)
            self._earlier = path
        # An epoch that is resumed from its last batch has no end.
        loop = trainer.fit_loop
        over = loop.epoch_loop.batch_progress.current.ready == trainer.num_training_batches
        self._record(trainer, max(0, loop.epoch_progress.current.ready - 1) + over)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends. Adds up what it has cost."""
        samples = batch_size(batch)
        self._samples += samples
        for sparse in _strategies(trainer):
            account = sparse._account
            for name, density in account.densities.items():
                share = (2.0 * density + account.gradient_densities.get(name, 1.0)) / 3.0
                self._worth[name] = self._worth.get(name, 0.0) + samples * share

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a training epoch ends. Records it."""
        self._record(trainer, trainer.current_epoch + 1)

    def _record(self, trainer: pl.Trainer, epoch: int) -> None:
        """Look at everything on every rank, and let the first one write it down unless it has."""
        strategies = _strategies(trainer)
        reports = [sparse.report() for sparse in strategies]
        rows = [row for report in reports for row in report.rows if row.treated]
        masks = [whole(sparse.mask(name)) for sparse in strategies for name in sparse.targets] if self.masks else None
        logged = dict(trainer.callback_metrics)  # which every rank must ask for
        # What is not news was logged in an epoch before, such as that of the last validation.
        news = {name: value for name, value in logged.items() if self._seen.get(name) is not value}
        self._seen = logged
        metrics = {name: float(value) for name, value in news.items() if name != "sparsity"}  # of the progress bar
        for report in reports:
            metrics |= report.totals
        record = {
            "epoch": epoch,
            "step": trainer.global_step,
            "metrics": {name: value for name, value in metrics.items() if not name.startswith(PER_LAYER)},
            "zeros": [row.zeros for row in rows],
            "dead": [row.dead_outputs for row in rows],
            "thresholds": [row.threshold for row in rows],
            "training": [self._worth[row.name] / self._samples if self._samples else None for row in rows],
        }
        if self._file is None or self._file.epoch >= epoch:
            return
        account = next((sparse._account for sparse in strategies if sparse._account.flops is not None), None)
        if account is not None and account.flops is not None and not self._file.knows_flops:
            counts = {**account.flops.by_layer, "": account.flops.rest}
            record["flops"] = {name: count / account.samples for name, count in counts.items()}
        self._file.append(record, None if masks is None else [mask.flatten().cpu().numpy() for mask in masks])

    def _header(self, trainer: pl.Trainer) -> dict[str, Any]:
        strategies = _strategies(trainer)
        weights = [
            {"name": row.name, "shape": list(row.shape), "outputs": outputs[row.name]}
            for sparse in strategies
            for outputs in [sparse._watch.count_outputs(sparse._weights.latents)]
            for row in sparse._rows
            if row.treated
        ]
        methods = [{"name": type(sparse).__name__, "arguments": _plain(sparse.arguments)} for sparse in strategies]
        return {"methods": methods, "weights": weights}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called when saving a checkpoint. Returns where the file is, and what training has cost."""
        earlier = None if self._earlier is None else str(self._earlier.absolute())
        return {"path": earlier, "samples": self._samples, "worth": dict(self._worth)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when loading a checkpoint."""
        self._earlier = None if state_dict["path"] is None else Path(state_dict["path"])
        self._samples, self._worth = state_dict["samples"], dict(state_dict["worth"])


def _strategies(trainer: pl.Trainer) -> list[SparseTraining]:
    return [callback for callback in callbacks(trainer) if isinstance(callback, SparseTraining)]


def _folder(trainer: pl.Trainer) -> Path:
    """Where Lightning puts what belongs to one run, such as its checkpoints."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def _plain(value: Any) -> Any:
    """What JSON can hold; of anything else what it prints as."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)
