"""The callback that trains a sparse model, and what a method is made of."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.arguments import Budgeted, Common, Patterned
from lightning_sparse.engine.budgets import BudgetedTraining
from lightning_sparse.engine.checks import (
    check_choice,
    check_fraction,
    check_number,
    check_overrides,
    check_patterns,
    check_positive,
    check_window,
)
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.engine.rewind import Rounds
from lightning_sparse.engine.weights import LatentWeights
from lightning_sparse.reports import Report
from lightning_sparse.schedules import SCHEDULES

__all__ = ["Budgeted", "Common", "Patterned", "SparseTraining"]


class SparseTraining(BudgetedTraining):
    r"""Train a sparse model in place of a dense one.

    For every target weight the optimizer updates a dense latent tensor :math:`\theta`, while the module holds the
    sparse :math:`w = P(\theta)` in its own parameter. After backward, :math:`g = \partial L/\partial w` becomes
    :math:`\partial L/\partial\theta = G(g)`. Outside the optimizer's step the module always holds :math:`w`; nothing is
    wrapped, renamed or added.

    Used as it is, the class combines ready parts. A published method is a subclass: a preset of these arguments, or
    an override of :meth:`select`, :meth:`project` or :meth:`pull_back`.

    Args:
        sparsity: Fraction of zeros among the targeted weights from ``end`` on, in ``[0, 1)``; None where the method
            has no budget, or it is given by ``flops``, ``parameters`` or ``bytes``.
        start: When the ramp starts: int = epoch, float = fraction of training.
        end: When it reaches ``sparsity``.
        initial_sparsity: Sparsity before ``start``, in ``[0, 1)``.
        schedule: Shape of the ramp: a name, or a function from progress in ``[0, 1]`` to a fraction in ``[0, 1]``.
        distribution: Whether all weights compete (``"global"``), each has the same sparsity (``"uniform"``), or small
            ones stay denser (``"er"``, ``"erk"``; see :func:`~lightning_sparse.functional.erdos_renyi`), or each has
            its part of the largest LAMP scores (``"lamp"``; see :func:`~lightning_sparse.functional.lamp_scores`).
        projection: :math:`P`: keep the largest (``"hard"``), or shrink all by a common threshold (``"soft"``).
        gradient: :math:`G`: all of it (``"straight_through"``), or that of the kept weights (``"masked"``).
        freeze: After which moment the mask stays as it is and only the kept weights train; None for never.
        update_every_n_steps: Optimizer steps between updates of masks and thresholds.
        threshold_weight_decay: L2 penalty on learned thresholds, where the method has them.
        flops: In place of ``sparsity``, the fraction of the dense model's inference FLOPs that may remain from ``end``
            on. Weights compete as ever, but each costs what it causes; the ramp runs over the costs removed.
        parameters: In place of ``sparsity``, the number of parameters of the model that may remain.
        bytes: In place of ``sparsity``, the size of the stored model, see :class:`Budgeted`.
        minimum_density: Fraction of each layer that is kept at least, in ``[0, 1)``; the others make up for it.
        pattern: Which weights live or die together: ``"unstructured"`` (none), ``"n:m"``, ``"block:AxB"`` or
            ``"channel"``, see :func:`~lightning_sparse.functional.parse_pattern`. Groups compete by their mean
            magnitude, or where the projection is ``"soft"`` by their norm, which the threshold shrinks (see
            :func:`~lightning_sparse.functional.group_soft_threshold`). With ``"n:m"`` weights compete until each m
            inputs have n left, so that the final sparsity is 1 - n/m. Weights that do not divide stay dense.
        targets: Patterns of the weights to treat, see :func:`~lightning_sparse.engine.targets.find_targets`.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` (a budget of its own) or None (stay dense).
        compact_optimizer_state: Whether the optimizer forgets pruned weights once the mask stays as it is: between
            steps its state has the kept ones only. Checkpoints hold it in full, and the weights are the same. Each step
            writes the full state anew, which takes time.
        log_layers: Also log sparsity, threshold, dead outputs and overlap of successive masks of every weight.
        verbose: Print a table of the targets before training and a summary after it.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: If the Trainer's flags, its strategy or an optimizer cannot be served.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = SparseTraining(0.75, verbose=False)
        >>> trainer = L.Trainer(
        ...     max_epochs=2,
        ...     limit_train_batches=4,
        ...     limit_val_batches=0,
        ...     callbacks=[callback],
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> callback.sparsity
        0.75
    """

    # The method in a few words, from which the docs are made. Every published method has its own.
    card: ClassVar[Card]
    # False where pruned latent weights are zero, so that the parameter itself serves as the latent tensor.
    keeps_latent: bool = True
    # Whether the mask of the beginning stays as it is.
    keeps_mask: bool = False
    # Whether w equals theta on the kept weights, so that a checkpoint need only hold theta where w is zero.
    exact_on_kept: bool = False
    # Whether selecting takes the dense gradient at the sparse weights, and takes the place of the optimizer's step.
    needs_gradient: bool = False
    replaces_step: bool = False
    # Whether what lives is chosen anew when an epoch begins, too, once the one before has been validated.
    per_epoch: bool = False
    # Whether the optimizer forgets what it knows of weights that start anew.
    reset_optimizer_state: bool = False
    # Whether scores are compared with their signs.
    signed: bool = False
    # Whether weights may live or die in groups.
    serves_patterns: bool = True
    # Of the random numbers of the method.
    seed: int = 0
    # Whether the network sees noisy weights while it trains on a batch.
    stochastic: bool = False
    # What steps the tensors that the method learns.
    learner: Literal["adam", "sgd"] = "sgd"
    # Several trainings, one after the other.
    rounds: Rounds | None = None

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        start: int | float = 0.0,
        end: int | float = 0.5,
        initial_sparsity: float = 0.0,
        schedule: Literal["constant", "cosine", "cubic", "linear"] | Callable[[float], float] = "cubic",
        distribution: Literal["er", "erk", "global", "lamp", "uniform"] = "global",
        projection: Literal["hard", "soft"] = "hard",
        gradient: Literal["straight_through", "masked"] = "straight_through",
        freeze: int | float | None = None,
        update_every_n_steps: int = 1,
        threshold_weight_decay: float = 0.0,
        flops: float | None = None,
        parameters: int | None = None,
        bytes: int | None = None,
        minimum_density: float = 0.0,
        pattern: str = "unstructured",
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict[str, float] | None] | None = None,
        compact_optimizer_state: bool = False,
        log_layers: bool = False,
        verbose: bool = True,
    ) -> None:
        check_fraction("sparsity", sparsity or 0.0)
        check_fraction("minimum_density", minimum_density)
        self.unit = self._choose_unit(sparsity, {"flops": flops, "parameters": parameters, "bytes": bytes})
        if minimum_density and sparsity is None and self.unit is None:
            raise ValueError(
                f"Expected argument `minimum_density` to be 0 without a budget, but got {minimum_density}."
            )
        check_window(start, end, freeze)
        check_fraction("initial_sparsity", initial_sparsity)
        if not callable(schedule):
            check_choice("schedule", schedule, SCHEDULES)
        check_choice("distribution", distribution, ("er", "erk", "global", "lamp", "uniform"))
        check_choice("projection", projection, ("hard", "soft"))
        check_choice("gradient", gradient, ("straight_through", "masked"))
        check_positive("update_every_n_steps", update_every_n_steps)
        check_number("threshold_weight_decay", threshold_weight_decay, negative=False)
        check_patterns("targets", targets)
        check_patterns("ignore", ignore)
        check_overrides(overrides, budget=sparsity is not None or self.unit is not None)
        self.pattern = None if pattern == "unstructured" else functional.parse_pattern(pattern)
        if self.pattern is not None:
            sparsity = self._check_pattern(self.pattern, sparsity, distribution, overrides)
        self.final_sparsity, self.initial_sparsity = None if self.unit else sparsity, initial_sparsity
        self.minimum_density, self.goal = minimum_density, str(self.unit or sparsity)
        self.start, self.end, self.freeze = start, end, freeze
        self.schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        self.distribution, self.projection, self.gradient = distribution, projection, gradient
        self.update_every_n_steps = update_every_n_steps
        self.threshold_weight_decay = threshold_weight_decay
        self.patterns: dict[str, Any] = {"targets": targets, "ignore": ignore, "overrides": overrides}
        if compact_optimizer_state and freeze is None and not self.keeps_mask:
            raise ValueError(
                "Expected argument `compact_optimizer_state` to be False where the mask is never frozen, but got True."
                " Set `freeze`, where the method has it."
            )
        self.compact_optimizer_state = compact_optimizer_state
        self.log_layers, self.verbose = log_layers, verbose

        super().__init__(LatentWeights(self))

    # -- what a method may override -----------------------------------------------------------------------------------

    def is_due(self, context: Context) -> bool:
        """Whether what lives is chosen anew after this step."""
        return context.step > 0 and context.step % self.update_every_n_steps == 0

    def lift(self, weight: Tensor) -> Tensor:
        """The latent of a weight that nothing is pruned from; the tensor given is free to use."""
        return weight

    def movable(self, latent: Latent) -> Tensor | None:
        """Which latent entries the optimizer may move, bool; None for all."""
        return None

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Declare the tensors that the method keeps per weight; those that require grad are learned."""
        return {}

    def score(self, latent: Latent) -> Tensor:
        """By what weights compete: magnitudes of numbers, or numbers if ``signed``, one for each."""
        return latent.theta

    def scale(self, latent: Latent) -> float:
        """By what the scores of a weight are divided before they compete; its threshold is in proportion."""
        return 1.0

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Choose what lives among weights that share a budget.

        Args:
            latents: The weights.
            sparsity: Fraction of zeros wanted now, in ``(0, 1)``; if weights cost differently, of what they cost.
            context: Where training stands.

        Returns:
            Per weight a ``"mask"`` (bool, True = kept) or a ``"threshold"`` (scalar).
        """
        scores, scales = [self.score(latent) for latent in latents], [self.scale(latent) for latent in latents]
        scaled = () if set(scales) == {1.0} else scales
        hard = self.projection == "hard"
        if self.pattern is not None:
            compare = functional.group_scores if hard else functional.vanishing_thresholds
            scores = [compare(score, self.pattern) for score in scores]
        if hard:
            masks = functional.topk_masks(scores, self.afford(latents, scores, sparsity or 0.0), signed=self.signed)
            if self.pattern is None:
                return [{"mask": mask} for mask in masks]
            pairs = zip(masks, latents, strict=True)
            return [{"mask": functional.spread_groups(mask, latent.theta, self.pattern)} for mask, latent in pairs]
        share, near = self._share(latents, scores, sparsity or 0.0, scaled), latents[0].state.get("threshold")
        near = None if near is None else near / scales[0]
        threshold = torch.tensor(math.inf)  # all that a pattern allows to go
        if self.pattern is None or share < 1.0:
            threshold = functional.magnitude_quantile(scores, share, near=near, scales=scaled)
        return [
            {"threshold": (threshold * scale).to(score.device, score.dtype)}
            for score, scale in zip(scores, scales, strict=True)
        ]

    def project(self, latent: Latent, context: Context, out: Tensor) -> None:
        """Write into ``out`` what the network sees of a weight that has a latent tensor.

        Where ``context.training`` that may be noisy; the noise comes from ``latent.noise``, so that :meth:`pull_back`
        can draw it again.
        """
        if "mask" in latent.state:
            functional.hard_threshold(latent.theta, latent.state["mask"], out=out)
        elif "threshold" in latent.state and self.pattern is not None:
            functional.group_soft_threshold(latent.theta, self.pattern, latent.state["threshold"], out=out)
        elif "threshold" in latent.state:
            functional.soft_threshold(latent.theta, latent.state["threshold"], out=out)
        else:
            out.copy_(latent.theta)

    def gather(self, latents: Sequence[Latent], context: Context) -> None:
        """Look at all gradients of a step, in ``latent.weight.grad``, before any of them is pulled back.

        Args:
            latents: The weights that have a gradient and are about to be stepped.
            context: Where training stands.
        """

    def pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        """Turn the gradient at the sparse weight into that of its latent.

        Gradients of learnable tensors in ``latent.state`` are left in their ``.grad``.

        Args:
            latent: The weight.
            grad: Gradient at the sparse weight; its memory may be reused for the result.
            context: Where training stands.
        """
        if self.gradient == "masked" and latent.state:
            return functional.mask_gradient(grad, latent.mask, out=grad)
        return grad

    def after_step(self, latent: Latent, lr: float, context: Context) -> None:
        """Move a latent beyond what the optimizer has just done.

        Args:
            latent: The weight.
            lr: Learning rate with which the optimizer has stepped it.
            context: Where training stands.
        """

    def learning_rate(self, group: Mapping[str, Any], context: Context) -> float:
        """Learning rate of what is learned for the weights in a parameter group of the host optimizer."""
        return float(group["lr"])

    def gradient_density(self, density: float, context: Context) -> float:
        """Fraction of the weight gradient that the method has to compute, for a weight of the given density."""
        return density if self.gradient == "masked" else 1.0

    # -- what other programs read -------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[str]:
        """Names of the weights under control."""
        return list(self._weights.latents)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the model has now among the weights under control."""
        return functional.sparsity(latent.weight for latent in self._bound().values())

    def latent(self, name: str) -> Tensor:
        """Dense latent tensor of a weight."""
        return self._find(name).theta

    def mask(self, name: str) -> Tensor:
        """Keep set of a weight, bool, True = kept."""
        return self._find(name).mask

    def threshold(self, name: str) -> float | None:
        """Threshold of a weight; None if it is not pruned by one."""
        threshold = self._find(name).state.get("threshold")
        return None if threshold is None else float(threshold)

    def report(self) -> Report:
        """Rows of all weights and totals; prints as a table. With sharded weights every rank must call it."""
        latents, flops = self._bound(), self._account.flops
        per_sample = {name: macs / self._account.samples for name, macs in flops.by_layer.items()} if flops else {}
        nonzeros, dead = dict(zip(latents, self._count(), strict=True)), self._watch.count_dead(latents)
        rows = [
            row.measured(
                row.numel - nonzeros[row.name],
                self.threshold(row.name),
                per_sample.get(row.name),
                dead[row.name],
            )
            if row.treated
            else row
            for row in self._rows
        ]
        return Report(type(self).__name__, rows, self.metrics(), flops.uncounted if flops else {})

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged each epoch."""
        module, latents = self._module_now(), self._bound()
        densities = {
            name: count / max(1, latent.weight.numel())
            for (name, latent), count in zip(latents.items(), self._count(), strict=True)
        }
        metrics = {"sparsity/total": self.sparsity}
        if self.target_sparsity is not None:
            metrics["sparsity/target"] = self.target_sparsity
        if module is not None:
            metrics["sparsity/model"] = functional.sparsity(module.parameters())
        metrics |= self._account.metrics(densities)
        metrics |= self._unit_metrics(densities)
        if self.log_layers:
            for name, latent in latents.items():
                metrics[f"sparsity/layer/{name}"] = 1.0 - densities[name]
                if "threshold" in latent.state:
                    metrics[f"threshold/{name}"] = float(latent.state["threshold"])
            metrics |= {f"mask_overlap/{name}": overlap for name, overlap in self._watch.overlap.items()}
            metrics |= {f"dead_outputs/{name}": dead for name, dead in self._watch.count_dead(latents).items()}
        return metrics

    def _find(self, name: str) -> Latent:
        check_choice("name", name, self._weights.latents)
        return self._bound()[name]
