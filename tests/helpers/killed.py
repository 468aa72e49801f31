"""Training runs that die. Each life is a process of its own, forked from one that has imported everything already."""

import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from lightning_sparse import SparseTraining
from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.models import Classifier, ResumableLoader, make_trainer, outcome, run
from tests.helpers.probes import LateProbe, Probe
from tests.helpers.ranks import process_group
from tests.helpers.strategies import SETTINGS

# Parts of paths: the swap, all of ours, the optimizers, what writes checkpoints, the training loops.
PLACES = [
    "lightning_sparse/engine/weights",
    "lightning_sparse/",
    "torch/optim/",
    "torch/serialization",
    "fsspec/",
    "lightning/pytorch/",
]
# Exit statuses of a life.
FINISHED, FAILED, RAISED = 0, 1, 2


@dataclass(frozen=True)
class Fault:
    """What ends a life.

    Attributes:
        kind: ``"kill"`` (SIGKILL), ``"raise"`` (an exception) or ``"interrupt"`` (Ctrl+C) before a line of Python;
            ``"alarm"`` (SIGKILL) at a time; ``"cut"`` (the process ends) or ``"full"`` (an exception) in the middle of
            writing a file; ``"peer"`` (an exception) when another rank dies.
        place: Part of the paths of the files with that line; number of the checkpoint that does not fit.
        moment: How many lines, seconds or bytes it takes.
    """

    kind: str
    place: Any
    moment: float


@dataclass(frozen=True)
class Life:
    """A process that resumes from the newest checkpoint and trains to the end or to its death.

    Attributes:
        folder: Where the checkpoints are.
        name: The strategy, one of ``SETTINGS``.
        fault: What ends it; None to live and count lines.
        in_place: Whether checkpoints are written where they belong, so that death leaves half of one.
        rank: Which of the processes that train together.
        port: Where they meet; 0 for a single one.
    """

    folder: Path
    name: str
    fault: Fault | None = None
    in_place: bool = False
    rank: int = 0
    port: int = 0

    @property
    def end(self) -> Path:
        """What a life that reaches its end leaves there."""
        return self.folder / f"end-{self.rank}.pt"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder / f"log-{self.rank}"


class Lines:
    """Counts lines of Python by file, and acts before the n-th of those in files with a certain path."""

    def __init__(self, places: Sequence[str], n: float = -1, act: Callable[[], None] | None = None) -> None:
        self.places, self.n, self.act = places, n, act
        self.counts = Counter[str]()

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not any(place in frame.f_code.co_filename for place in self.places):
            return None
        if event == "line":
            self.counts[frame.f_code.co_filename] += 1
            self.n -= 1
            if self.n == 0 and self.act is not None:
                sys.settrace(None)
                self.act()
        return self.trace


class FullDisk(Callback):
    """Lets no file exceed a size from the n-th checkpoint on."""

    def __init__(self, n: int, size: int) -> None:
        self.n, self.size = n, size

    def on_save_checkpoint(self, *args: Any) -> None:
        self.n -= 1
        if self.n == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Restored(Checkpoint):
    """Checks that a checkpoint held what the latents in it project to."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse, self.trained = sparse, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.held = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.ckpt_path is not None and not self.trained:
            assert_same(dict(pl_module.named_parameters()), self.held)
        self.trained = True


class InPlace(TorchCheckpointIO):
    """Writes checkpoints where they belong instead of moving them there."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


def readable(path: Path) -> bool:
    """Whether a checkpoint is whole."""
    try:
        torch.load(path, weights_only=True)
    except Exception:  # of many kinds, depending on what is missing
        return False
    return True


def newest(folder: Path, pattern: str = "*.ckpt") -> Path | None:
    """The newest checkpoint that can be read."""
    paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    return next(filter(readable, reversed(paths)), None)


class MidEpoch(ModelCheckpoint):
    """Saves nothing after the last batch of an epoch.

    Lightning 2.6 counts epochs wrongly once it has resumed from such a checkpoint, so that a run that is killed again
    repeats batches, with or without our callback.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def make_savers(folder: Path) -> list[ModelCheckpoint]:
    """Save every second step and every epoch, under a name that tells the logged sparsity."""
    common = {"filename": "{step}-{sparsity:.6f}", "save_top_k": -1, "enable_version_counter": False}
    return [
        MidEpoch(folder, every_n_train_steps=2, save_last=True, **common),
        ModelCheckpoint(folder, every_n_epochs=1, save_on_train_epoch_end=True, **common),
    ]


def live(life: Life) -> int:
    """Called in a process of its own; returns its exit status."""
    model, callback = Classifier(), SETTINGS[life.name].build()
    restored, fault, lines = Restored(callback), life.fault, Lines(PLACES)
    callbacks = [Probe(callback), callback, *make_savers(life.folder), restored, LateProbe(callback)]
    if fault is not None and fault.kind in ("cut", "full"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault.kind == "cut" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        callbacks.append(FullDisk(fault.place, int(fault.moment)))
    elif fault is not None and fault.kind not in ("alarm", "peer"):
        lines = Lines([fault.place], fault.moment, lambda: die(fault.kind))
    flags: dict[str, Any] = {"plugins": [InPlace()] if life.in_place else []}
    if life.port:
        os.environ |= process_group(life.rank, life.port)
        timeout = timedelta(seconds=60)  # never reached: a closed connection is noticed at once
        flags |= {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timeout), "devices": 2}
    trainer = make_trainer(*callbacks, log_every_n_steps=1, **flags)
    checkpoint, errors = newest(life.folder), ERRORS.get(fault.kind, ()) if fault is not None else ()
    try:
        if fault is None or lines.act is not None:
            sys.settrace(lines.trace)
        run(trainer, model, None if checkpoint is None else str(checkpoint), ResumableLoader(seed=life.rank))
    except errors:
        sys.settrace(None)
        check_the_dead(trainer, model, callback, restored)
        return RAISED
    sys.settrace(None)
    torch.save({"outcome": outcome(trainer, model, callback), "lines": lines.counts}, life.end)
    return FINISHED


class FatalError(Exception):
    """Raised on purpose."""


# What surfaces. Lightning takes an error while it looks for a checkpoint for the absence of that, and PyTorch cannot
# close a file that does not fit.
ERRORS: dict[str, Any] = {
    "raise": (FatalError, FileNotFoundError),
    "interrupt": SystemExit,
    "full": (OSError, RuntimeError),
    "peer": RuntimeError,
}


def die(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyboardInterrupt if kind == "interrupt" else FatalError


def check_the_dead(trainer: L.Trainer, model: L.LightningModule, callback: SparseTraining, restored: Restored) -> None:
    """After an exception the model holds w, and nothing is left behind."""
    if restored.trained:
        assert_sparse(model, callback)
    assert all(not o._optimizer_step_post_hooks and not o._optimizer_step_pre_hooks for o in trainer.optimizers)
    assert not any(type(c).__module__.startswith("lightning_sparse") for c in trainer.callbacks if c is not callback)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def serve(connection: Connection) -> None:
    """Say so when ready. Live the lives that arrive, together, and answer with exit codes, negative for a signal."""
    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        processes = [fork(life) for life in connection.recv()]
        connection.send([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes])


def fork(life: Life) -> int:
    process = os.fork()
    if process == 0:
        status = FAILED
        os.dup2(os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
        try:
            status = live(life)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if life.fault is not None and life.fault.kind == "alarm":
        time.sleep(life.fault.moment)
        os.kill(process, signal.SIGKILL)
    return process
