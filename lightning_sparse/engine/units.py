"""What may remain of a model, in the user's unit."""

import math
from collections.abc import Sequence
from fractions import Fraction

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse.engine.checks import check_amount
from lightning_sparse.engine.latent import Latent
from lightning_sparse.flops import FlopCount

__all__ = ["Budget"]


class Budget:
    """A limit for the whole model that is no sparsity, and the prices of its weights.

    Args:
        unit: ``"flops"`` (fraction of the dense inference FLOPs), ``"parameters"`` (nonzero ones) or ``"bytes"`` (one
            bit per targeted weight, the size of each kept one, and all else).
        amount: What may remain.

    Attributes:
        uniform: Whether all weights cost the same, so that the limit is a sparsity after all.
    """

    def __init__(self, unit: str, amount: float) -> None:
        check_amount(unit, amount)
        self.name, self.amount, self.uniform = unit, amount, True
        self._rest, self._grain = Fraction(), Fraction(1)

    def __str__(self) -> str:
        return f"`{self.name}={self.amount}`"

    def appraise(self, latents: Sequence[Latent], module: nn.Module, flops: FlopCount | None) -> float:
        """Find what each weight costs and what all else takes.

        Returns:
            Fraction of the costs of the weights without a budget of their own that has to go, in ``[0, 1)``.

        Raises:
            MisconfigurationException: If the limit cannot be reached, or FLOPs have not been counted.
        """
        prices = self._price(latents, module, flops)
        # Whole numbers, as small as possible, so that sums are exact.
        scale = Fraction(math.lcm(*(price.denominator for price in prices)))
        self._grain = Fraction(math.gcd(*(int(price * scale) for price in prices)) or 1) / scale
        for latent, price in zip(latents, prices, strict=True):
            latent.cost = int(price / self._grain)
        self.uniform = len({latent.cost for latent in latents}) == 1
        fixed, common = 0, [latent for latent in latents if latent.sparsity is None]
        for latent in latents:
            if latent.sparsity is not None:
                fixed += latent.cost * (latent.weight.numel() - round(latent.sparsity * latent.weight.numel()))
        limit = math.floor((Fraction(self.amount) - self._rest) / self._grain) - fixed
        total = sum(latent.cost * latent.weight.numel() for latent in common)
        if limit < 1 or not total:
            raise MisconfigurationException(
                f"Expected argument `{self.name}` to be more than {self.remains(fixed):.6g}, which remains whatever is"
                f" pruned, but got {self.amount}. Allow more, or let more weights be pruned (`targets`, `ignore`,"
                " `overrides`)."
            )
        return max(0.0, 1 - limit / total)

    def remains(self, cost: float) -> float:
        """What remains of the model, in its unit, when the kept weights cost so much."""
        return float(self._rest + self._grain * Fraction(cost))

    def _price(self, latents: Sequence[Latent], module: nn.Module, flops: FlopCount | None) -> list[Fraction]:
        """The cost of a weight of each latent; what does not depend on the mask becomes the rest."""
        if self.name == "flops":
            if flops is None or not flops.dense:
                raise MisconfigurationException(
                    "A budget in FLOPs needs their count before training, from an `example_input_array` that the"
                    " LightningModule has and with which its forward can be traced. Set it."
                )
            shares = [Fraction(flops.by_layer.get(latent.name, 0), flops.dense) for latent in latents]
            self._rest = 1 - sum(shares, Fraction())
            return [share / max(1, latent.weight.numel()) for share, latent in zip(shares, latents, strict=True)]
        treated = {id(latent.weight) for latent in latents}
        if self.name == "parameters":
            self._rest = Fraction(sum(p.numel() for p in module.parameters() if id(p) not in treated))
            return [Fraction(1) for _ in latents]
        stored = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
        others = sum(t.numel() * t.element_size() for key, t in stored.items() if key not in treated)
        self._rest = Fraction(others + sum(math.ceil(latent.weight.numel() / 8) for latent in latents))
        return [Fraction(latent.weight.element_size()) for latent in latents]
