"""When each thing happens: the only code that knows Lightning's training hooks."""

import weakref
from copy import deepcopy
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sparse.engine.account import Account, batch_size, replicas
from lightning_sparse.engine.agreement import check_agreement
from lightning_sparse.engine.clock import Clock
from lightning_sparse.engine.compact import CompactState
from lightning_sparse.engine.latent import Context
from lightning_sparse.engine.order import First, callbacks, line_up
from lightning_sparse.engine.preflight import check_optimizers, check_overlap, check_trainer, check_weights
from lightning_sparse.engine.rewind import Rewinder, Rounds
from lightning_sparse.engine.steps import StepWatch, foresee, has_skipped, unscale
from lightning_sparse.engine.targets import Target, find_targets
from lightning_sparse.engine.watch import Watch
from lightning_sparse.engine.weights import FORMAT, LatentWeights
from lightning_sparse.reports import Report, Row, show_report, show_targets

__all__ = ["TrainingHooks"]


class TrainingHooks(pl.Callback):
    """Show the dense latents to the optimizer, the sparse weights to everyone else, and tell what has happened.

    Args:
        weights: The weights under control, and the method by which they live.
    """

    # Set by the method, see `SparseTraining`.
    start: int | float
    end: int | float
    freeze: int | float | None
    final_sparsity: float | None
    goal: str
    patterns: dict[str, Any]
    rounds: Rounds | None
    verbose: bool

    def __init__(self, weights: LatentWeights) -> None:
        self._weights = weights
        self._account = Account()
        self._rewinder = Rewinder()
        self._rows: list[Row] = []
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._clock = Clock(1.0, 1.0)
        self._max_epochs: int | None = None
        self._epoch, self._position = 0.0, 0.0
        self._attached = False
        self._first = First(self)
        self._watch = Watch()
        self._done, self._begun = 0, -1
        self._restored: dict[str, Any] | None = None
        self._steps = StepWatch()
        self._compact = CompactState()

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged each epoch."""
        raise NotImplementedError

    def report(self) -> Report:
        """Rows of all weights and totals."""
        raise NotImplementedError

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the model has now among the weights under control."""
        raise NotImplementedError

    @property
    def target_reached(self) -> bool:
        """Whether the model has its final sparsity."""
        raise NotImplementedError

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(**self.patterns)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins. Checks the Trainer and touches nothing."""
        if stage != TrainerFn.FITTING:
            return
        check_trainer(type(self).__name__, trainer)
        line_up(trainer, self._first, self)
        self._max_epochs, self._attached, self._begun = trainer.max_epochs, False, -1
        self._account = Account()
        self._restored = None  # what a test has loaded; what this fit resumes from is loaded later

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins and optimizers exist. Checks optimizers and targets."""
        if trainer.ckpt_path is None:  # else the loops have yet to be restored, and there is no sanity check
            trainer.fit_loop.setup_data()  # the sanity check comes before the length of an epoch is known
            self._set_clock(trainer)
        method, verdicts = type(self).__name__, self._verdicts(pl_module)
        check_optimizers(method, trainer.optimizers, verdicts, compact=self._weights.method.compact_optimizer_state)
        check_weights(method, verdicts)
        for other in callbacks(trainer):
            if isinstance(other, TrainingHooks) and other is not self:
                check_overlap(method, verdicts, type(other).__name__, other._verdicts(pl_module))

    def _set_clock(self, trainer: pl.Trainer) -> None:
        self._clock = Clock.of(trainer, self._max_epochs)
        moments = {name: getattr(self, name) for name in ("start", "end", "freeze")}
        epochs = {name: self._clock.at(moment, name) for name, moment in moments.items() if moment is not None}
        if list(epochs.values()) != sorted(epochs.values()):
            found = ", ".join(f"`{name}` on epoch {epoch:g}" for name, epoch in epochs.items())
            raise MisconfigurationException(f"Expected `start` <= `end` <= `freeze`, but they fall {found}.")
        # A method that anneals over the whole training raises here if that has no end.
        self._weights.method.gradient_density(1.0, self._context())
        if self.rounds is not None:
            self.rounds.length(self._clock.epochs)

    def _verdicts(self, module: pl.LightningModule) -> list[Target]:
        return find_targets(module, **self.patterns)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the sanity check starts, the first moment at which weights and checkpoint are in place."""
        self._attach(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins. Takes the latents and projects them, unless that has been done."""
        self._attach(trainer, pl_module)

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._attached and self._restored is None:
            return
        self._module = weakref.ref(pl_module)
        trainer.fit_loop.setup_data()  # needed only if a checkpoint held no loops
        self._set_clock(trainer)
        loop, batches, epoch = trainer.fit_loop, 0, trainer.current_epoch
        if self._restored is not None:  # perhaps a finished run, so that no batch will set the clock
            batches = loop.epoch_loop.batch_progress.current.ready if self._clock.sized else 0
            epoch = max(0, loop.epoch_progress.current.ready - 1)
        self._tick(trainer, batches, epoch)
        verdicts = self._verdicts(pl_module)
        self._rows = [Row(v.name, tuple(v.parameter.shape), v.treated, v.reason) for v in verdicts]
        restored, self._restored = self._restored, None
        if self.rounds is not None:
            self._rewinder.begin(trainer, self.rounds, self._clock.epochs, restored and restored["rewinder"])
        if restored is not None:
            self._account.load_state_dict(restored["account"])
        self._account.count_example(trainer, pl_module)  # a budget in FLOPs asks for it
        self._weights.take((v for v in verdicts if v.treated), self._context(), restored)
        self._watch.begin(self._weights.latents, pl_module, restored and restored["watch"])
        if batches == self._clock.batches and self._watch.epoch < epoch:  # resumed from the last batch: it has no end
            self._look(pl_module, epoch)
        self._weights.count()
        self._done = max(self._weights.steps.values(), default=0)
        if self.verbose and not self._attached and trainer.is_global_zero:
            show_targets(type(self).__name__, self._rows)
        self._attached = True

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose and rewind what is chosen and rewound between epochs, before other callbacks look at the model."""
        if self._begun == trainer.current_epoch or not self._trains(trainer):
            return
        self._begun = trainer.current_epoch
        self._weights.bind(pl_module)
        if self._weights.method.per_epoch and not self._weights.frozen:
            self._tick(trainer, 0, trainer.current_epoch)
            self._weights.choose(self._context())
            self._weights.count()
        if self.rounds is None:
            return
        self._rewinder.keep(trainer, pl_module, self.rounds, trainer.current_epoch)
        over = self.rounds.ended(trainer.current_epoch, self._clock.epochs)
        if over > self._rewinder.done:
            self._rewinder.done = over
            self._weights.choose(self._context())
            self._rewinder.rewind(trainer, pl_module, self.rounds)
            self._weights.enforce()
            self._weights.count()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a training epoch begins. Keeps the promised zeros if another callback averaged the weights."""
        self._weights.enforce()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch begins. Sets the clock to the end of this batch."""
        self._attach(trainer, pl_module)  # a learning rate finder may have restored a checkpoint meanwhile
        self._steps.follow(trainer.optimizers, lambda optimizer: self._after_step(trainer, optimizer))
        if self._weights.compact:
            self._weights.bind(pl_module)
            self._compact.follow(trainer.optimizers, self._weights.latents.values())
        self._tick(trainer, batch_idx + 1, trainer.current_epoch)
        self._account.open(pl_module)
        if self._weights.method.stochastic and self._trains(trainer):
            self._weights.bind(pl_module)
            self._weights.start_batch(self._context())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called before ``optimizer.step`` and before gradients are clipped. Shows the latents to the optimizer."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._weights.method.replaces_step:
            unscale(scaler, optimizer)  # a step without gradients leaves a fused kernel nothing to look at
        takes_place, scale = foresee(scaler, optimizer)
        if takes_place and self._trains(trainer):
            self._weights.bind(pl_module)
            self._weights.expose(optimizer, trainer.optimizers.index(optimizer), self._context, scale)
            self._weights.learner.clip(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    def _trains(self, trainer: pl.Trainer) -> bool:
        """Whether steps are ours: a learning rate finder removes callbacks, SWA makes a last pass for BatchNorm."""
        return self in callbacks(trainer) and not trainer.fit_loop._skip_backward

    def _after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        if has_skipped(optimizer):
            self._weights.withdraw(optimizer, self._context())
            return
        stepped = self._weights.stepped(optimizer, trainer.optimizers.index(optimizer), self._context)
        if not stepped and self._trains(trainer):
            raise MisconfigurationException(
                f"`{type(optimizer).__name__}` was stepped without Lightning, so `{type(self).__name__}` could not show"
                " it the latents. In manual optimization step the optimizers that `self.optimizers()` returns."
            )

    def end_noise(self) -> None:
        """Show everybody the weights without noise, if the last batch of an epoch was skipped after it had started."""
        self._weights.settle(self._context())

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Settle what no optimizer step has, and keep the accounts, before other callbacks look at the model."""
        if not self._trains(trainer):
            return
        if self._weights.method.stochastic:
            self._weights.bind(pl_module)  # which also drops gathered copies of noisy weights
        self._account.close(batch)
        self._price()
        self._account.spend(batch_size(batch) * replicas(trainer))
        self._weights.settle(self._context())
        moment = None if self.freeze is None or self._weights.frozen else self._clock.at(self.freeze, "freeze")
        if moment is not None and self._position > moment:
            self._weights.freeze(self._context())
        self._weights.count()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.barebones and batch_idx % every == 0:
            pl_module.log("sparsity", self._weights.sparsity, prog_bar=True, logger=False, batch_size=1)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins. Keeps the promised zeros in averaged weights, lets others monitor sparsity."""
        if self._attached and trainer.state.fn == TrainerFn.FITTING:
            self._weights.enforce()
            self._publish(trainer, log=False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a training epoch ends. Compares the ranks, warns of vanished weights, logs sparsity and FLOPs."""
        check_agreement(type(self).__name__, trainer, self._weights.latents.values())
        self._look(pl_module, trainer.current_epoch)
        self._publish(trainer, log=True)

    def _look(self, pl_module: pl.LightningModule, epoch: int) -> None:
        self._weights.bind(pl_module)
        settled = self.final_sparsity is not None and self._context().progress >= 1.0 and self.target_reached
        self._watch.look(type(self).__name__, self._weights.latents, epoch=epoch, settled=settled)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends. Keeps the promised zeros in averaged weights."""
        self._weights.enforce()
        missed = None if self.target_reached else self.goal
        self._watch.conclude(type(self).__name__, self._weights.latents, self.sparsity, missed)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit ends. Takes the latents of a finished run that did not go on, and prints the summary."""
        if self._restored is not None:
            self._attach(trainer, pl_module)
        if self._attached and not self._watch.looked:  # resumed when nothing was left to train
            self._look(pl_module, trainer.fit_loop.epoch_progress.current.ready - 1)
        if self.verbose:
            report = self.report()  # on every rank, as each may hold a part of the weights
            monitors = {getattr(callback, "monitor", None) for callback in callbacks(trainer)}
            found = {key: float(value) for key, value in trainer.callback_metrics.items() if key in monitors}
            if trainer.is_global_zero:
                show_report(report, found)

    def interrupt(self, trainer: pl.Trainer) -> None:
        """Leave sparse weights and no hooks, before other callbacks look at the model or save it."""
        if self._attached:
            self._weights.settle(self._context(), everything=True)
        self._detach(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict ends. Removes every hook."""
        self._detach(trainer)

    def _detach(self, trainer: pl.Trainer) -> None:
        self._account.abandon()
        self._steps.release()
        self._compact.release()
        trainer.callbacks = [callback for callback in callbacks(trainer) if callback is not self._first]  # type: ignore[attr-defined]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called when saving a checkpoint. Returns the latents and all that resuming needs."""
        if self._restored is not None:  # not taken yet
            return self._restored
        if not self._attached:  # a learning rate finder saves before training
            return {"format": FORMAT}
        state = {**self._weights.state_dict(), "account": self._account.state_dict()}
        state["watch"] = self._watch.state_dict(self._weights.latents)
        return state if self.rounds is None else {**state, "rewinder": self._rewinder.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when loading a checkpoint. Keeps the state until the weights are in place."""
        if state_dict.get("format") != FORMAT:
            raise ValueError(
                f"Expected the state of `{self.state_key}` to have format {FORMAT},"
                f" but got {state_dict.get('format')!r}. Resume with the version that wrote the checkpoint."
            )
        self._restored = state_dict if "latents" in state_dict else None

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when loading a checkpoint. Says so if it was written without this callback."""
        if trainer.state.fn == TrainerFn.FITTING and self.state_key not in checkpoint["callbacks"]:
            rank_zero_warn(
                f"The checkpoint holds no state of `{self.state_key}`:"
                " its latents start from the weights in the checkpoint."
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when saving a checkpoint. Keeps the promised zeros in averaged weights, and noise out of the file."""
        self._weights.quiet(checkpoint["state_dict"], self._context())
        self._weights.enforce(checkpoint["state_dict"])

    def _context(self, step: int = 0) -> Context:
        start, end = self._clock.at(self.start, "start"), self._clock.at(self.end, "end")
        progress = self._clock.progress(self._position, start, end)
        elapsed = min(1.0, self._position / max(self._clock.epochs, 1e-9))
        where = (step, self._epoch, self._clock.epochs, progress, elapsed, self._weights.generator, self._position)
        return Context(*where, rounds=self._rewinder.done)

    def _tick(self, trainer: pl.Trainer, batches: int, epoch: int) -> None:
        """Read the clock, with so many batches of an epoch done."""
        steps = len(trainer.optimizers) if batches else 0
        self._position = self._clock.position(epoch, batches, trainer.global_step + steps)
        self._epoch = epoch if self._clock.sized else self._position

    def _publish(self, trainer: pl.Trainer, *, log: bool) -> None:
        metrics = self.metrics()
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
        if log:
            for logger in trainer.loggers:
                logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=trainer.global_step)

    def _price(self) -> None:
        """Let this batch cost what the weights that it has used cost."""
        # The step that this batch has taken, or of whose gradient it is a part.
        done = max(self._weights.steps.values(), default=0)
        densities, context = self._weights.densities, self._context(done if done > self._done else done + 1)
        if self._weights.method.stochastic and not self._weights.frozen:
            densities = dict.fromkeys(densities, 1.0)  # noisy weights are dense
        self._done = done
        needed = {
            name: a if self._weights.frozen else self._weights.method.gradient_density(a, context)
            for name, a in densities.items()
        }
        self._account.price(densities, needed)

    def _module_now(self) -> pl.LightningModule | None:
        return None if self._module is None else self._module()

    def __getstate__(self) -> dict[str, Any]:
        # Lightning leaves methods of the model in `log` and `log_dict`: a copy would hold a copy of the model.
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**state, "_module": None, "_steps": StepWatch(), "_compact": CompactState()}

    def __copy__(self) -> Self:
        return deepcopy(self)  # the parts of a callback refer to it
