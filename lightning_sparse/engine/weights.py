"""The swap: dense latents in the optimizer's step, sparse weights at every other time."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.engine.learner import Learner
from lightning_sparse.engine.method import Method
from lightning_sparse.engine.targets import Target, reshard
from lightning_sparse.functional import count_nonzeros, hard_threshold, mask_gradient
from lightning_sparse.functional.sharding import is_sharded, local, spread, sum_each, whole

__all__ = ["FORMAT", "LatentWeights"]

# Version of the layout of `state_dict`.
FORMAT = 2


class LatentWeights:
    """All weights under control, and which version of each is in the model.

    Args:
        method: Chooses what lives, what the network sees and what the gradient is.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.latents: dict[str, Latent] = {}
        self.frozen = False
        self.steps: dict[int, int] = {}
        # Whether a batch is being trained on, so that the network may see noise.
        self.training = False
        self.learner = Learner(())
        # The weights that hold theta at present, by the optimizer that is about to step them.
        self._exposed: dict[Optimizer, list[tuple[Latent, dict[str, Any]]]] = {}
        # Whether a step of one optimizer has changed a budget that weights of another share.
        self._stale = False
        self._selected_last = False
        self._nonzeros: dict[str, int] = {}
        self.generator = torch.Generator()

    # -- taking and giving back ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, targets: Iterable[Target], context: Context, restored: dict[str, Any] | None) -> None:
        """Take the latents of the targets and project them into the model.

        Latents come from a checkpoint, else from an earlier ``fit`` if the model still holds what it left there, else
        from the model's weights.
        """
        previous, self.latents = ({} if self.frozen else self.latents), {}
        self.frozen = bool(restored and restored["frozen"])
        fresh = []
        for target in targets:
            weight = target.parameter
            theta = self.method.lift(weight.detach().clone()) if self.method.keeps_latent else None
            latent = Latent(
                target.name, target.path, weight, theta, self.method.init_state(weight.detach()), target.sparsity
            )
            self.latents[latent.name] = latent
            if restored is not None and latent.name in restored["latents"]:
                if self.frozen:
                    latent.state.clear()  # there is but a mask
                latent.unpack(restored["latents"][latent.name])
            elif latent.name in previous and self._left_by(previous[latent.name], weight, context):
                latent.unpack(previous[latent.name].pack(exact_on_kept=False))  # perhaps to another device or type
            else:
                fresh.append(latent)
        self.method.appraise(list(self.latents.values()))
        self.learner = Learner(self.latents.values(), self.method.threshold_weight_decay, self.method.learner)
        self.steps = {}
        self.generator.manual_seed(self.method.seed)
        self._selected_last = self._stale = False
        self._nonzeros.clear()
        if restored is not None:
            self.learner.load_state_dict(restored["learner"])
            self.steps = dict(restored["steps"])
            self._selected_last = restored["selected_last"]
            self.generator.set_state(restored["generator"].cpu())
        self._exposed.clear()
        self.training = False
        if fresh:
            self._select(fresh, context)
        if self.method.stochastic:
            self._shake(fresh)
        self._project(self.latents.values(), context)

    def bind(self, module: nn.Module) -> None:
        """Look every parameter up again: strategies and users may have replaced it."""
        reshard(module)
        for latent in self.latents.values():
            latent.weight = module.get_parameter(latent.path)

    def _left_by(self, latent: Latent, weight: Tensor, context: Context) -> bool:
        """Whether the model still holds what the latent projects to."""
        if latent.dense is None:  # the mask is all there is to keep
            mask = latent.state.get("mask")
            if mask is None or mask.shape != weight.shape:
                return False
            return not count_nonzeros([hard_threshold(weight, spread(whole(~mask).to(weight.device), weight))]).any()
        if latent.dense.shape != weight.shape:
            return False
        expected = torch.empty_like(latent.dense)
        self.method.project(latent, context, expected)
        return not count_nonzeros([spread(whole(expected).to(weight.device, weight.dtype), weight) != weight]).any()

    # -- noise --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_batch(self, context: Context) -> None:
        """Show the network noisy weights while it trains on a batch."""
        self.training = not self.frozen
        self._project(self.latents.values() if self.training else (), context)

    @torch.no_grad()
    def quiet(self, tensors: dict[str, Tensor], context: Context) -> None:
        """Take the noise out of a state dict that is saved while a batch is trained on."""
        for latent in self.latents.values() if self.training else ():
            weight, held = torch.empty_like(latent.theta), tensors.get(latent.path)
            self.method.project(latent, context, weight)
            if held is None or not is_sharded(held):
                weight = whole(weight)  # all ranks enter
            if held is not None:  # in memory of its own, as the network goes on with the noise
                tensors[latent.path] = weight.to(held.device)

    def _shake(self, latents: Iterable[Latent]) -> None:
        """Draw the next noise; the same on every rank."""
        for latent in latents:
            latent.seed = int(torch.randint(1 << 62, (), generator=self.generator))

    # -- one optimizer step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def expose(self, optimizer: Optimizer, index: int, context: Callable[[int], Context], scale: float = 1.0) -> None:
        """Map gradients to the latents and put the latents into the parameters, just before the optimizer steps.

        Args:
            optimizer: Is about to step.
            index: Its place among the optimizers.
            context: Tells where training stands once so many steps of this optimizer are done.
            scale: Factor that the gradients carry, and that the optimizer will take away.
        """
        by_parameter = {id(latent.weight): latent for latent in self.latents.values()}
        groups = [(by_parameter.get(id(p)), group) for group in optimizer.param_groups for p in group["params"]]
        hosted = [(latent, group) for latent, group in groups if latent is not None]
        if all(latent.weight.grad is None for latent, _ in hosted):
            hosted = []  # the optimizer will do nothing, so the model may hold something else, such as averaged weights
        now = context(self.steps.get(index, 0) + 1)
        due = not self.frozen and self.method.is_due(now)
        self._hear([latent for latent, _ in hosted], now, scale)
        self._sum_learned(latent for latent, _ in hosted)
        if due and self.method.replaces_step and any("mask" in latent.state for latent, _ in hosted):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # so that the optimizer leaves it alone
        # In this order, so that an interrupt at any moment loses nothing.
        _copy((latent.weight, latent.dense) for latent, _ in hosted)
        self._exposed[optimizer] = hosted

    def _hear(self, latents: list[Latent], context: Context, scale: float) -> None:
        """Turn the gradients at the weights, which carry a factor, into those of the latents."""
        heard = [(latent, latent.weight.grad) for latent in latents if latent.weight.grad is not None]
        if heard and scale != 1.0:
            torch._foreach_div_([local(grad) for _, grad in heard], scale)
        if not self.frozen:
            self.method.gather([latent for latent, _ in heard], context)
        keep = self.method.needs_gradient and not self.frozen and self.method.is_due(context)
        for latent in latents:
            latent.grad = None
        for latent, grad in heard:
            latent.grad = grad.clone() if keep else None
            latent_grad = self._pull_back(latent, grad, context)
            if latent_grad is not grad:
                local(grad).copy_(local(latent_grad))
        if heard and scale != 1.0:
            torch._foreach_mul_([local(grad) for _, grad in heard], scale)

    def _sum_learned(self, latents: Iterable[Latent]) -> None:
        """Let what is learned for a whole weight hear of all its parts."""
        heard = [
            (tensor.grad, latent.weight)
            for latent in latents
            for tensor in latent.learned.values()
            if is_sharded(latent.weight) and not is_sharded(tensor) and tensor.grad is not None
        ]
        if heard:
            sums = sum_each([grad for grad, _ in heard], [weight for _, weight in heard])
            torch._foreach_copy_([grad for grad, _ in heard], list(sums))

    @torch.no_grad()
    def stepped(self, optimizer: Optimizer, index: int, context: Callable[[int], Context]) -> bool:
        """Take the stepped latents back and show the network their new projection.

        Returns:
            Whether the optimizer held latents; if not, something stepped it past the callback.
        """
        if optimizer not in self._exposed:
            return False
        hosted = self._exposed[optimizer]
        for latent, _ in hosted:
            self._hold_back(latent, optimizer)
        _copy((latent.dense, latent.weight) for latent, _ in hosted)
        del self._exposed[optimizer]
        if not hosted:
            return True
        self.steps[index] = self.steps.get(index, 0) + 1
        now = context(self.steps[index])
        self.learner.step(hosted, optimizer, lambda group: self.method.learning_rate(group, now))
        latents = [latent for latent, _ in hosted]
        if not self.frozen:
            for latent, group in hosted:
                if latent.weight.grad is not None:
                    self.method.after_step(latent, float(group["lr"]), now)
            if self.method.stochastic:
                self._shake(latents)
        self._update(latents, optimizer, now)
        return True

    def _hold_back(self, latent: Latent, optimizer: Optimizer) -> None:
        """Undo what the optimizer has done to entries that it may not move."""
        movable = self.method.movable(latent)
        if movable is None or latent.dense is None or self.frozen:
            return
        weight, dense = local(latent.weight), local(latent.dense)
        weight.copy_(torch.where(local(movable), weight, dense))
        _reset(optimizer, latent, movable)

    @torch.no_grad()
    def withdraw(self, optimizer: Optimizer, context: Context) -> None:
        """Show the network what it saw before: the optimizer has not stepped after all."""
        hosted = self._exposed.pop(optimizer, [])
        self.learner.forget()
        self._project([latent for latent, _ in hosted], context)

    @torch.no_grad()
    def settle(self, context: Context, *, everything: bool = False) -> None:
        """Leave every weight sparse and without noise: after a batch, a skipped step or the last of several optimizers.

        Args:
            context: Where training stands.
            everything: Whether anything may have been interrupted anywhere.
        """
        everywhere, self.training = everything or self.training or self._stale, False
        interrupted = [latent for hosted in self._exposed.values() for latent, _ in hosted]
        for optimizer, hosted in self._exposed.items():
            for latent, _ in hosted:
                self._hold_back(latent, optimizer)
        _copy((latent.dense, latent.weight) for latent in interrupted)
        self._exposed.clear()
        if interrupted:
            self.learner.forget()
        # One rank alone cannot select among weights that it shares with others.
        if self._stale and not (everything and any(is_sharded(latent.weight) for latent in self.latents.values())):
            self._select(self.latents.values(), context)
        self._project(self.latents.values() if everywhere else interrupted, context)
        self._stale = False

    def _update(self, latents: list[Latent], optimizer: Optimizer, context: Context) -> None:
        last = context.progress >= 1.0 and not self._selected_last
        if (self.method.is_due(context) or last) and not self.frozen:
            # What momentum has moved off the mask does not compete.
            self._project([latent for latent in latents if latent.dense is None], context)
            for latent in latents:
                latent.stepped, latent.slots = True, optimizer.state.get(latent.weight, {})
            self._select(latents, context, optimizer)
            for latent in latents:
                latent.grad, latent.stepped, latent.slots = None, False, {}
            self._selected_last = context.progress >= 1.0
            self._stale = len(latents) < len(self.latents)
        self._project(latents, context)

    def _select(self, latents: Iterable[Latent], context: Context, optimizer: Optimizer | None = None) -> None:
        chosen = {latent.name for latent in latents}
        for pool, sparsity in self.method.budgets(list(self.latents.values()), context):
            if chosen.isdisjoint(latent.name for latent in pool):
                continue
            for latent, selection in zip(pool, self.method.choose(pool, sparsity, context), strict=True):
                if latent.name in chosen:
                    grown = latent.select(selection)
                    if optimizer is not None and grown is not None and self.method.reset_optimizer_state:
                        _reset(optimizer, latent, ~grown)

    def _project(self, latents: Iterable[Latent], context: Context) -> None:
        context = replace(context, training=self.training)
        for latent in latents:
            if latent.dense is not None:
                self.method.project(latent, context, latent.weight)
            elif "mask" in latent.state:
                hard_threshold(latent.weight, latent.state["mask"], out=latent.weight)

    def _pull_back(self, latent: Latent, grad: Tensor, context: Context) -> Tensor:
        if self.frozen:
            return mask_gradient(grad, latent.mask, out=grad)
        return self.method.pull_back(latent, grad, replace(context, training=self.training))

    @torch.no_grad()
    def choose(self, context: Context) -> None:
        """Choose what lives among all weights, and show it to the network."""
        self._select(self.latents.values(), context)
        self._project(self.latents.values(), context)

    # -- the mask as a promise ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(self, context: Context) -> None:
        """Bake w into the latents and keep the mask: from now on only the kept weights train."""
        self.choose(context)
        self.frozen = True  # first: an interrupt may leave some of the latents as they are
        self.learner = Learner(())
        self._nonzeros.clear()
        for latent in self.latents.values():
            mask = latent.mask
            latent.state, latent.dense = {"mask": mask}, None

    @property
    def compact(self) -> bool:
        """Whether nobody will ask any more what an optimizer remembers of pruned weights."""
        return self.method.compact_optimizer_state and (self.frozen or self.method.keeps_mask)

    @torch.no_grad()
    def enforce(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Zero the pruned entries of whatever the model (or a state dict) holds now, such as averaged weights."""
        for latent in self.latents.values():
            held = latent.weight if tensors is None else tensors.get(latent.path)
            if latent.state.keys().isdisjoint({"mask", "threshold"}):
                continue
            mask = latent.mask
            if is_sharded(mask) and (held is None or not is_sharded(held)):
                mask = whole(mask)  # all ranks enter, though only the first holds the tensors of a full checkpoint
            if held is not None:
                hard_threshold(held, mask.to(held.device), out=held)

    # -- counting -----------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Count the nonzero entries of what the network sees, with one transfer from the device."""
        if self.frozen and self._nonzeros:
            return
        counts = count_nonzeros([latent.weight for latent in self.latents.values()])
        self._nonzeros = dict(zip(self.latents, counts.tolist(), strict=True))

    @property
    def densities(self) -> dict[str, float]:
        """Fraction of nonzero entries of each weight at the last :meth:`count`."""
        return {name: count / max(1, self.latents[name].theta.numel()) for name, count in self._nonzeros.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of zeros of all weights at the last :meth:`count`."""
        total = sum(latent.theta.numel() for latent in self.latents.values())
        return 1.0 - sum(self._nonzeros.values()) / total

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only; the first rank gets all of sharded weights."""
        latents = {}
        for name, latent in self.latents.items():
            packed = latent.pack(self.method.exact_on_kept)
            if not is_sharded(latent.weight) or dist.get_rank() == 0:
                latents[name] = packed
        return {
            "format": FORMAT,
            "frozen": self.frozen,
            "steps": dict(self.steps),
            "selected_last": self._selected_last,
            "generator": self.generator.get_state(),
            "latents": latents,
            "learner": self.learner.state_dict(),
        }


def _reset(optimizer: Optimizer, latent: Latent, kept: Tensor) -> None:
    """Forget what the optimizer remembers of all entries but some."""
    for slot in optimizer.state.get(latent.weight, {}).values():
        if isinstance(slot, Tensor) and slot.shape == latent.weight.shape:
            hard_threshold(slot, kept, out=slot)


def _copy(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> None:
    """Copy the second of each pair into the first, all at once; pairs without a dense latent need nothing."""
    real = [(local(to), local(source)) for to, source in pairs if to is not None and source is not None]
    if real:
        torch._foreach_copy_([to for to, _ in real], [source for _, source in real])
