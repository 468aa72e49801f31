"""The record of one weight under control."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.functional import Pattern, exceeds, group_exceeds, hard_threshold
from lightning_sparse.functional.sharding import is_sharded, spread, whole

__all__ = ["Context", "Latent", "pack_bits"]


@dataclass
class Latent:
    """All tensors that belong to one sparse weight. Where that is sharded, so are those of its shape.

    Attributes:
        name: Name of the parameter.
        path: Name by which ``module.get_parameter`` finds it.
        weight: The parameter: what the network sees.
        dense: Dense latent tensor; None where the parameter itself is the latent, because pruned entries are zero.
        state: Tensors of the method by name: ``"mask"`` (bool, True = kept) or ``"threshold"`` (scalar; kept is what
            exceeds it), and whatever the method declares. Those that require grad are learned from their ``.grad``.
        sparsity: Own budget, if it does not share the common one.
        cost: What one kept weight takes from the budget.
        group: How many weights live or die together.
        pattern: Which, if not each by itself.
        grad: Dense gradient at the sparse weight, while the method selects and if it asks for that
            (``needs_gradient``).
        stepped: Whether an optimizer has just stepped this weight, while the method selects.
        slots: State of that optimizer for this weight, while the method selects.
        seed: Of the noise that the network sees until the next step, if the method has noise.
    """

    name: str
    path: str
    weight: Tensor
    dense: Tensor | None
    state: dict[str, Tensor] = field(default_factory=dict)
    sparsity: float | None = None
    cost: int = 1
    group: int = 1
    pattern: Pattern | None = None
    grad: Tensor | None = None
    stepped: bool = False
    slots: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def theta(self) -> Tensor:
        """The dense latent weights, wherever they are kept."""
        return self.weight.detach() if self.dense is None else self.dense

    @property
    def mask(self) -> Tensor:
        """The keep set, bool, True = kept."""
        if "mask" in self.state:
            return self.state["mask"]
        if "threshold" in self.state:
            return self.exceeding(self.state["threshold"])
        return torch.ones_like(self.theta, dtype=torch.bool)

    def exceeding(self, threshold: Tensor) -> Tensor:
        """What a soft threshold keeps, bool, True = kept."""
        if self.pattern is None:
            return exceeds(self.theta, threshold)
        return group_exceeds(self.theta, self.pattern, threshold)

    @property
    def learned(self) -> dict[str, Tensor]:
        """The learnable tensors of the state."""
        return {key: tensor for key, tensor in self.state.items() if tensor.requires_grad}

    @property
    def noise(self) -> torch.Generator:
        """Source of the noise, which starts anew whenever it is asked for."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def momentum(self) -> Tensor:
        """What the optimizer remembers of the dense gradients, or else the gradient; while the method selects."""
        if "exp_avg_sq" in self.slots:
            adam: Tensor = self.slots["exp_avg"] / (self.slots["exp_avg_sq"].sqrt() + 1e-8)
            return adam
        buffer: Tensor | None = self.slots.get("momentum_buffer")
        if buffer is None:
            buffer = self.grad
        assert buffer is not None
        return buffer

    def select(self, selection: Mapping[str, Tensor]) -> Tensor | None:
        """Replace mask and threshold; neither means that everything is kept.

        Returns:
            Where the parameter is the latent, the entries that start anew, from zero: those in ``"grown"``, else those
            that the mask keeps and did not keep before.
        """
        before, selection = self.state.get("mask"), dict(selection)
        for key in ("mask", "threshold"):
            self.state.pop(key, None)
        grown = selection.pop("grown", None)
        self.state.update(selection)
        if self.dense is not None or "mask" not in selection:
            return None
        if grown is None:
            if before is None:
                return None
            grown = selection["mask"] & ~before
        hard_threshold(self.theta, ~grown, out=self.theta)
        return grown

    def pack(self, exact_on_kept: bool) -> dict[str, Any]:
        """Turn the record into tensors fit for a checkpoint, which holds ``weight`` already.

        Args:
            exact_on_kept: Whether the latent equals the weight on the keep set and need not be stored there.
        """
        packed: dict[str, Any] = {
            "seed": self.seed,
            "state": {key: _gather(tensor) for key, tensor in self.state.items() if tensor.dtype != torch.bool},
            "bits": {key: pack_bits(whole(tensor)) for key, tensor in self.state.items() if tensor.dtype == torch.bool},
        }
        if self.dense is not None and exact_on_kept:
            packed["pruned"] = _gather(self.dense)[~_gather(self.mask)]
        elif self.dense is not None:
            packed["theta"] = _gather(self.dense)
        return packed

    def unpack(self, packed: Mapping[str, Any]) -> None:
        """Restore the record from :meth:`pack`; ``weight`` must hold what the checkpoint held."""
        self.seed = packed["seed"]
        for key, tensor in packed["state"].items():
            declared = self.state.get(key, tensor)
            restored = self._spread(tensor) if is_sharded(declared) else tensor.to(self.weight.device, copy=True)
            self.state[key] = restored.to(declared.dtype).requires_grad_(declared.requires_grad)
        for key, bits in packed["bits"].items():
            self.state[key] = self._spread(_unpack_bits(bits, self.weight.shape))
        if "theta" in packed:
            self.dense = self._spread(packed["theta"]).to(self.weight.dtype)
        elif "pruned" in packed:
            dense = whole(self.weight.detach()).clone()
            dense[~whole(self.mask)] = packed["pruned"].to(dense)
            self.dense = self._spread(dense)
        else:
            self.dense = None

    def _spread(self, full: Tensor) -> Tensor:
        """Lay a tensor that every rank has in full out like the weight, in memory of its own."""
        return spread(full.to(self.weight.device), self.weight).clone()


@dataclass(frozen=True)
class Context:
    """Where training stands.

    Attributes:
        step: Steps so far of the optimizer at hand.
        epoch: Index of the current epoch; where the length of an epoch is unknown, the position in the training.
        epochs: Length of the whole training in epochs, infinite when open-ended.
        progress: Progress over the window from ``start`` to ``end``, in ``[0, 1]``.
        elapsed: Fraction of the whole training so far, in ``[0, 1]``; 0 when that is open-ended.
        generator: Source of random numbers, the same on every rank and after resuming.
        position: Epochs so far, with the fraction of the current one.
        training: Whether a batch is being trained on, so that the network may see noise.
        rounds: Trainings that are over, where a method takes several.
    """

    step: int
    epoch: float
    epochs: float
    progress: float
    elapsed: float = 0.0
    generator: torch.Generator | None = None
    position: float = 0.0
    training: bool = False
    rounds: int = 0


def _gather(tensor: Tensor) -> Tensor:
    """The whole tensor, in memory of its own: that of the CPU if one device may not hold all such tensors."""
    full = whole(tensor.detach())
    return full.cpu() if is_sharded(tensor) else full.clone()


def pack_bits(mask: Tensor) -> Tensor:
    """Eight entries in a byte, on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    flat = np.unpackbits(bits.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(flat).bool().view(shape)
