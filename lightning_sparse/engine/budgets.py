"""Who shares a budget, how much of it is due, and how no layer gets too little."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.engine.hooks import TrainingHooks
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.engine.targets import Target, has_inputs_first
from lightning_sparse.engine.units import Budget

__all__ = ["BudgetedTraining"]

T = TypeVar("T")


class BudgetedTraining(TrainingHooks):
    """What a method has to give up at each moment, and whether the model has."""

    # Set by the method, see `SparseTraining`.
    final_sparsity: float | None
    initial_sparsity: float
    minimum_density: float
    distribution: str
    schedule: Callable[[float], float]
    unit: Budget | None
    pattern: functional.Pattern | None
    serves_patterns: bool
    signed: bool
    # What the method was called with, defaults included.
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments, as a run that is recorded shows them."""
        self = super().__new__(cls)
        with suppress(TypeError):  # which the call of `__init__` explains
            signature = inspect.signature(cls)
            bound = signature.bind_partial(*args, **kwargs)
            bound.apply_defaults()
            self.arguments = dict(bound.arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    self.arguments |= self.arguments.pop(parameter.name)
        return self

    def select(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Choose what lives among weights that share a budget."""
        raise NotImplementedError

    def _choose_unit(self, sparsity: float | None, units: Mapping[str, float | None]) -> Budget | None:
        given = {unit: amount for unit, amount in units.items() if amount is not None}
        if not given:
            return None
        if len(given) > 1 or self._is_explicit(sparsity):
            also = given if sparsity is None else {"sparsity": sparsity, **given}
            raise ValueError(f"Expected one argument for the budget, but got {also}. Keep one of them.")
        return Budget(*next(iter(given.items())))

    def _is_explicit(self, sparsity: float | None) -> bool:
        """Whether a sparsity is not just the default of the method."""
        parameter = inspect.signature(type(self)).parameters.get("sparsity")
        return sparsity is not None and (parameter is None or sparsity != parameter.default)

    def _check_pattern(
        self,
        pattern: functional.Pattern,
        sparsity: float | None,
        distribution: str,
        overrides: Mapping[str, Mapping[str, float] | None] | None,
    ) -> float | None:
        """The sparsity that a pattern leaves to the method, or sets."""
        if not self.serves_patterns:
            raise ValueError(
                f"Expected argument `pattern` to be 'unstructured' for `{type(self).__name__}`, but got"
                f" {pattern.name!r}. Use a method that takes patterns, such as `ST3` or `GMP`."
            )
        if pattern.sparsity is None:
            return sparsity
        own = [settings for settings in (overrides or {}).values() if settings is not None]
        if self.unit is not None or own or (self._is_explicit(sparsity) and sparsity != pattern.sparsity):
            raise ValueError(
                f"Expected no other budget beside the pattern {pattern.name!r}, whose sparsity is"
                f" {pattern.sparsity:g}, but got {self.unit or own or sparsity}. Leave that out."
            )
        if distribution not in ("global", "uniform"):
            raise ValueError(
                f"Expected argument `distribution` to be 'global' or 'uniform' with the pattern {pattern.name!r}, which"
                f" all layers end with, but got {distribution!r}."
            )
        return pattern.sparsity

    def _verdicts(self, module: pl.LightningModule) -> list[Target]:
        return [self._fit(verdict, module) for verdict in super()._verdicts(module)]

    def _fit(self, verdict: Target, module: pl.LightningModule) -> Target:
        """Leave a weight dense that does not divide into groups, and say why."""
        if self.pattern is None or not verdict.treated:
            return verdict
        layer, shape = module.get_submodule(verdict.path.rpartition(".")[0]), tuple(verdict.parameter.shape)
        if has_inputs_first(layer):
            reason = f"{type(layer).__name__} has its inputs first, which {self.pattern.name} does not serve"
        elif not self.pattern.fits(shape):
            reason = f"{'×'.join(map(str, shape))} does not divide into {self.pattern.name}"
        else:
            return verdict
        return dataclasses.replace(verdict, treated=False, reason=reason)

    def appraise(self, latents: Sequence[Latent]) -> None:
        """Find what weights cost, and from that the fraction of the costs to remove, if the budget is no sparsity."""
        for latent in latents:
            latent.pattern = self.pattern
            latent.group = 1 if self.pattern is None else self.pattern.group(latent.weight.shape)
        module = self._module_now()
        if self.unit is not None and module is not None:
            if self.unit.name == "flops":
                self._account.count_example(module.trainer, module, run=True)
            self.final_sparsity = self.unit.appraise(latents, module, self._account.flops)
        if self.minimum_density and self.final_sparsity is not None:
            self._check_minimum(latents, self.final_sparsity)

    def _check_minimum(self, latents: Sequence[Latent], final: float) -> None:
        kept = [(1.0 - (final if latent.sparsity is None else latent.sparsity)) * _cost(latent) for latent in latents]
        lowest = [latent.cost * least(latent, self.minimum_density) for latent in latents]
        common = [index for index, latent in enumerate(latents) if latent.sparsity is None]
        for group in (common, *([index] for index in range(len(latents)) if index not in common)):
            allowed, needed = sum(kept[index] for index in group), sum(lowest[index] for index in group)
            if needed > allowed + 0.5 + 1e-6:
                raise MisconfigurationException(
                    f"Expected argument `minimum_density` to leave room for a budget of {self.goal}, but got"
                    f" {self.minimum_density}, which keeps {needed / allowed:.4g} times as much as that allows in"
                    f" {', '.join(latents[index].name for index in group[:3])}. Lower it, or allow more."
                )

    def budgets(self, latents: Sequence[Latent], context: Context) -> list[tuple[list[Latent], float | None]]:
        """Group the weights that compete with one another, each group with the sparsity wanted now."""
        if self.final_sparsity is None:
            return [(list(latents), None)]
        way = self.way(context)
        common = [latent for latent in latents if latent.sparsity is None]
        own = [([latent], self._ramp(latent.sparsity, way)) for latent in latents if latent.sparsity is not None]
        wanted = self._ramp(self.final_sparsity, way)
        if self.distribution == "global":
            return [*([(common, wanted)] if common else []), *own]
        shares = share_out(common, wanted, self.distribution, self.minimum_density, never_more=self.unit is not None)
        return [*(([latent], share) for latent, share in zip(common, shares, strict=True)), *own]

    def way(self, context: Context) -> float:
        """How much of the way to the final budget the network is to have gone now."""
        return self.schedule(context.progress)

    def _ramp(self, final: float, way: float) -> float:
        return final if way == 1.0 else self.initial_sparsity + way * (final - self.initial_sparsity)

    def afford(
        self, latents: Sequence[Latent], scores: Sequence[Tensor], sparsity: float, scales: Sequence[float] = ()
    ) -> int:
        """How many of the largest scores may be kept, to give up a fraction of what all weights cost."""
        costs = [latent.cost * latent.group for latent in latents]
        if self._same_price(latents):
            total = sum(score.numel() for score in scores)
            return total - round(sparsity * total)
        total = sum(cost * score.numel() for cost, score in zip(costs, scores, strict=True))
        budget = round((1.0 - sparsity) * total)
        return functional.affordable(scores, costs, budget, signed=self.signed, scales=scales)

    def _same_price(self, latents: Sequence[Latent]) -> bool:
        """Whether a fraction of the scores is that fraction of the budget."""
        # A budget in another unit is never exceeded, be it by half of a group.
        return len({latent.cost * latent.group for latent in latents}) == 1 and (
            self.unit is None or self.pattern is None
        )

    def _share(
        self, latents: Sequence[Latent], scores: Sequence[Tensor], sparsity: float, scales: Sequence[float]
    ) -> float:
        """Fraction of the scores that a soft threshold has to remove."""
        if self.pattern is not None and self.pattern.within:
            return sparsity / (self.pattern.sparsity or 1.0)  # as only so many may go
        if self._same_price(latents):
            return sparsity
        return 1.0 - self.afford(latents, scores, sparsity, scales) / sum(score.numel() for score in scores)

    def choose(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Select among weights that share a budget, so that none of them falls below its minimum."""

        def allocate(some: Sequence[Latent], sparsity: float | None) -> list[dict[str, Tensor]]:
            return [{} for _ in some] if sparsity == 0.0 else self.select(some, sparsity, context)

        if not self.minimum_density or sparsity is None:
            return allocate(latents, sparsity)
        return hold_minimum(latents, sparsity, self.minimum_density, allocate, _count_kept)

    # -- what other programs read --------------------------------------------------------------------------------------

    @property
    def target_sparsity(self) -> float | None:
        """Fraction of zeros that the schedule asks for now; None if the method has no budget, or not of this kind."""
        if self.unit is not None and not self.unit.uniform:
            return None
        return self._targeted(lambda latent: latent.weight.numel(), self.way(self._context()))

    def _targeted(self, size: Callable[[Latent], int], way: float) -> float | None:
        """Fraction of the weights, or of what they cost, that is to go once so much of the way is done."""
        sizes = [(latent.sparsity, size(latent)) for latent in self._weights.latents.values()]
        final = self.final_sparsity
        if final is None or not sum(size for _, size in sizes):
            return None
        removed = sum(size * self._ramp(final if own is None else own, way) for own, size in sizes)
        return removed / sum(size for _, size in sizes)

    @property
    def target_reached(self) -> bool:
        """Whether the ramp is over and the model takes no more than its final budget, to the weight."""
        wanted, costs = self._targeted(_cost, 1.0), [latent.cost for latent in self._bound().values()]
        if wanted is None:
            return True
        largest = max(latent.cost * latent.group for latent in self._weights.latents.values())
        slack = largest * (1 if self.distribution == "global" else len(costs))
        kept = sum(cost * count for cost, count in zip(costs, self._count(), strict=True))
        allowed = (1.0 - wanted) * sum(map(_cost, self._weights.latents.values()))
        return self.way(self._context()) == 1.0 and kept <= allowed + slack + 1e-6

    def _unit_metrics(self, densities: Mapping[str, float]) -> dict[str, float]:
        """What remains and what may, in the unit of the budget, if that is no sparsity."""
        costs = {name: _cost(latent) for name, latent in self._weights.latents.items()}
        target = self._targeted(_cost, self.way(self._context()))
        if self.unit is None or target is None:
            return {}
        metrics = {f"{self.unit.name}/target": self.unit.remains((1.0 - target) * sum(costs.values()))}
        if self.unit.name != "flops":  # of which the account tells
            kept = sum(costs[name] * density for name, density in densities.items())
            metrics[f"{self.unit.name}/total"] = self.unit.remains(round(kept))
        return metrics

    def _count(self) -> list[int]:
        """Nonzero entries of each weight now."""
        counts: list[int] = functional.count_nonzeros([latent.weight for latent in self._bound().values()]).tolist()
        return counts

    def _bound(self) -> dict[str, Latent]:
        module = self._module_now()
        if module is not None:
            self._weights.bind(module)
        return self._weights.latents


def _cost(latent: Latent) -> int:
    """What all of a layer costs."""
    return latent.cost * latent.weight.numel()


def least(latent: Latent, minimum_density: float) -> int:
    """How many weights of a layer are kept at least."""
    return math.ceil(minimum_density * latent.weight.numel() / latent.group) * latent.group


def _count_kept(latent: Latent, selection: Mapping[str, Tensor]) -> int:
    """How many weights a selection keeps."""
    if not selection:
        return latent.weight.numel()
    mask = selection["mask"] if "mask" in selection else latent.exceeding(selection["threshold"])
    return int(functional.count_nonzeros([mask]))


def hold_minimum(
    latents: Sequence[Latent],
    sparsity: float,
    minimum_density: float,
    allocate: Callable[[Sequence[Latent], float], Iterable[T]],
    count: Callable[[Latent, T], int],
) -> list[T]:
    """Allocate a budget so that no layer keeps less than its minimum; the others make up for it.

    Args:
        latents: The weights that share the budget.
        sparsity: Fraction of what they cost to remove.
        minimum_density: Fraction of each layer that is kept at least.
        allocate: From weights and the fraction that they have to give up to something per weight.
        count: How many weights of a layer that something keeps.
    """
    costs = {latent.name: latent.cost * latent.weight.numel() for latent in latents}
    held: dict[str, T] = {}
    removed, free = sparsity * sum(costs.values()), list(latents)
    while True:
        found = dict(zip((latent.name for latent in free), allocate(free, sparsity), strict=True))
        low = [latent for latent in free if count(latent, found[latent.name]) < least(latent, minimum_density)]
        if not low:
            found |= held
            return [found[latent.name] for latent in latents]
        for latent in low:
            share = 1.0 - least(latent, minimum_density) / latent.weight.numel()
            (held[latent.name],) = allocate([latent], share)
            removed -= share * costs[latent.name]
        free = [latent for latent in free if latent.name not in held]
        left = sum(costs[latent.name] for latent in free)
        sparsity = removed / left if left and removed > 0.5 else 0.0  # costs are whole numbers


def share_out(
    latents: Sequence[Latent], sparsity: float, distribution: str, minimum_density: float, *, never_more: bool
) -> list[float]:
    """Sparsity of each of the layers that have budgets of their own.

    Args:
        latents: The weights of the layers.
        sparsity: Fraction of what they cost that all together have to give up.
        distribution: ``"uniform"``, ``"er"``, ``"erk"`` or ``"lamp"``.
        minimum_density: Fraction of each layer that is kept at least.
        never_more: Whether numbers of weights are rounded down, so that the budget is never exceeded.
    """

    def allocate(some: Sequence[Latent], sparsity: float) -> list[float]:
        if distribution == "uniform" or not sparsity:
            return [sparsity for _ in some]
        shapes, costs = [latent.weight.shape for latent in some], [latent.cost for latent in some]
        if distribution == "lamp":
            scores = [functional.lamp_scores(latent.theta) for latent in some]
            kept = functional.affordable(scores, costs, round((1.0 - sparsity) * sum(map(_cost, some))))
            counts = functional.count_nonzeros(functional.topk_masks(scores, kept)).tolist()
            return [1.0 - n / max(1, latent.weight.numel()) for n, latent in zip(counts, some, strict=True)]
        return functional.erdos_renyi(shapes, sparsity, kernel=distribution == "erk", costs=costs)

    def count(latent: Latent, share: float) -> int:
        size = latent.weight.numel()
        return math.floor((1.0 - share) * size + 1e-6) if never_more else size - round(share * size)

    shares = hold_minimum(latents, sparsity, minimum_density, allocate, count)
    if never_more:
        shares = [1.0 - count(*pair) / max(1, pair[0].weight.numel()) for pair in zip(latents, shares, strict=True)]
    return shares
