"""What goes wrong with masks unseen: layers that vanish, outputs that die, masks that do not settle."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.engine.latent import Latent, pack_bits
from lightning_sparse.engine.targets import has_inputs_first
from lightning_sparse.functional.sharding import whole

__all__ = ["Watch", "dead_outputs"]

_BITS_IN_BYTE = np.array([byte.bit_count() for byte in range(256)])


class Watch:
    """Looks at the masks when an epoch ends, and warns once of each thing.

    Attributes:
        overlap: Per weight, how much the masks at the ends of the last two epochs overlap: kept by both, divided by
            kept by either. Empty before there are two.
        epoch: Index of the last epoch at whose end it has looked, -1 before there is one.
        looked: Whether it has looked since :meth:`begin`.
    """

    def __init__(self) -> None:
        self.overlap: dict[str, float] = {}
        self.looked = False
        self._warned: set[str] = set()
        self._outputs: dict[str, tuple[int, int]] = {}
        # The masks at the end of an epoch, bit-packed in the memory of the CPU, and whether they had to settle then.
        self._masks: dict[str, Tensor] = {}
        self.epoch = -1
        self._settled = False

    def begin(self, latents: Mapping[str, Latent], module: nn.Module, restored: Mapping[str, Any] | None) -> None:
        """Start anew, or from what a checkpoint holds."""
        layers = {name: module.get_submodule(latent.path.rpartition(".")[0]) for name, latent in latents.items()}
        self._outputs = {
            name: _outputs(layer) if latents[name].weight.ndim > 1 else (0, 1) for name, layer in layers.items()
        }
        self.overlap, self._masks, self.epoch, self._settled, self.looked = {}, {}, -1, False, False
        if restored is not None and restored["epoch"] >= 0:
            self.overlap, self.epoch, self._settled = dict(restored["overlap"]), restored["epoch"], restored["settled"]
            self._masks = {
                name: restored["masks"][name].cpu() if name in restored["masks"] else pack_bits(whole(latent.mask))
                for name, latent in latents.items()
            }

    def conclude(self, method: str, latents: Mapping[str, Latent], sparsity: float, missed: str | None) -> None:
        """Warn of a training that ends with less than it was to give.

        Args:
            method: Name of the method.
            latents: The weights.
            sparsity: Fraction of zeros that they end with.
            missed: The goal, if it has not been reached.
        """
        if missed is not None:
            rank_zero_warn(
                f"Training ended at sparsity {sparsity:.4f}, before `{method}` reached {missed}."
                " Let `end` come earlier or train longer."
            )
        elif sparsity == 0.0 and any("threshold" in latent.state for latent in latents.values()):
            rank_zero_warn(
                f"`{method}` pruned nothing: no threshold exceeded a weight. Raise `threshold_init`,"
                " `threshold_weight_decay` or the length of training."
            )

    def look(self, method: str, latents: Mapping[str, Latent], *, epoch: int, settled: bool) -> None:
        """Compare the masks with those of the epoch before; every rank must enter.

        Args:
            method: Name of the method.
            latents: The weights.
            epoch: Index of the epoch that ends.
            settled: Whether masks should not change much any more.
        """
        self.looked = True
        if epoch == self.epoch:  # resumed from its end
            return
        both = either = 0
        previous, self._masks, self.overlap = self._masks, {}, {}
        for name, latent in latents.items():
            mask = whole(latent.mask)
            self._warn_of_pruned(method, latent, mask)
            now = self._masks[name] = pack_bits(mask)
            if name in previous:
                common, union = _ones(now & previous[name]), _ones(now | previous[name])
                self.overlap[name] = common / union if union else 1.0
                both, either = both + common, either + union
        if settled and self._settled and 2 * both < either and "overlap" not in self._warned:
            self._warned.add("overlap")
            rank_zero_warn(
                f"`{method}` does not settle on what it keeps: its masks at the ends of epochs {self.epoch} and"
                f" {epoch} overlap by {both / either:.0%}, though the ramp has ended. Weights that come and go learn"
                " little. Change masks less often (`update_every_n_steps`), or lower the learning rate."
            )
        self.epoch, self._settled = epoch, settled

    def _warn_of_pruned(self, method: str, latent: Latent, mask: Tensor) -> None:
        if not mask.numel():
            return
        dead, outputs = dead_outputs(mask, *self._outputs[latent.name])
        if dead == outputs:
            ties = " (a threshold prunes equal magnitudes together)" if "threshold" in latent.state else ""
            kind, what = "all", f"all {mask.numel()} weights of `{latent.name}`{ties}"
        elif 2 * dead > outputs:
            kind, what = "most", f"all weights of {dead} of the {outputs} outputs of `{latent.name}`, which are dead"
        else:
            return
        if f"{kind} of {latent.name}" not in self._warned:
            self._warned.add(f"{kind} of {latent.name}")
            rank_zero_warn(
                f"`{method}` has pruned {what}. Leave it dense with `ignore`, or give it a budget with `overrides`."
            )

    def count_outputs(self, latents: Mapping[str, Latent]) -> dict[str, int]:
        """Outputs of the layer of each weight."""
        sizes = {name: (latents[name].weight.shape[dim], groups) for name, (dim, groups) in self._outputs.items()}
        return {name: size * groups if self._outputs[name][0] else size for name, (size, groups) in sizes.items()}

    def count_dead(self, latents: Mapping[str, Latent]) -> dict[str, int]:
        """Dead outputs of each weight now; every rank must enter."""
        return {name: dead_outputs(whole(latent.mask), *self._outputs[name])[0] for name, latent in latents.items()}

    def state_dict(self, latents: Mapping[str, Latent]) -> dict[str, Any]:
        """All of it, masks only as far as they are not those of now; every rank must enter."""
        now = {name: pack_bits(whole(latents[name].mask)) for name in self._masks}
        masks = {name: bits for name, bits in self._masks.items() if not torch.equal(bits, now[name])}
        return {"epoch": self.epoch, "settled": self._settled, "overlap": dict(self.overlap), "masks": masks}


def dead_outputs(mask: Tensor, dim: int = 0, groups: int = 1) -> tuple[int, int]:
    """Count the outputs of a layer that no weight reaches.

    Args:
        mask: Of one of its weights, bool, True = kept.
        dim: Dimension of the weight that counts outputs.
        groups: Parts of the first dimension that have outputs of their own, where ``dim`` is the second.

    Returns:
        Number of dead outputs, and of all; of a vector both are of its entries.

    Example:
        >>> mask = torch.tensor([[True, False], [True, False]])
        >>> dead_outputs(mask), dead_outputs(mask, dim=1), dead_outputs(mask, dim=1, groups=2)
        ((0, 2), (1, 2), (2, 4))
    """
    if dim:
        mask = torch.cat([part.transpose(0, 1) for part in mask.chunk(groups)])
    alive = mask.reshape(len(mask), -1).any(1)
    return len(alive) - int(alive.sum()), len(alive)


def _ones(packed: Tensor) -> int:
    """Number of bits that are set."""
    return int(np.bincount(packed.numpy(), minlength=256) @ _BITS_IN_BYTE)


def _outputs(layer: nn.Module) -> tuple[int, int]:
    """The dimension of a layer's weight that counts outputs, and how many groups have outputs of their own."""
    groups = layer.groups if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
    return int(isinstance(layer, nn.Embedding) or has_inputs_first(layer)), groups
