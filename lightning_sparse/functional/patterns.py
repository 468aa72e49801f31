"""Weights that live or die in groups, and groups of which some weights live."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse.functional.sharding import like, local, spread, whole

__all__ = [
    "Pattern",
    "group_exceeds",
    "group_scores",
    "group_soft_threshold",
    "parse_pattern",
    "spread_groups",
    "vanishing_thresholds",
]


class Pattern(NamedTuple):
    """Which weights belong together, see :func:`parse_pattern`."""

    name: str
    numbers: tuple[int, int]

    @property
    def within(self) -> bool:
        """Whether weights compete within their group."""
        return self.name[:1].isdigit()

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros that the pattern itself asks for, if it does."""
        kept, of = self.numbers
        return 1.0 - kept / of if self.within else None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape divides into groups."""
        outputs, inputs = self.numbers
        if self.name == "channel":
            return True
        return len(shape) > 1 and shape[1] % inputs == 0 and (self.within or shape[0] % outputs == 0)

    def group(self, shape: Sequence[int]) -> int:
        """How many weights live or die together in a weight of this shape."""
        return 1 if self.within else math.prod(shape[1:]) if self.name == "channel" else math.prod(self.numbers)

    def split(self, theta: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """A weight in which some dimensions run over the members of a group."""
        a, b = self.numbers
        if self.name == "channel":
            return theta.unsqueeze(1), tuple(range(1, theta.ndim + 1))
        outputs, inputs, *kernel = theta.shape
        if self.within:
            return theta.reshape(outputs, inputs // b, b, *kernel), (2,)
        return theta.reshape(outputs // a, a, inputs // b, b, *kernel), (1, 3)


def parse_pattern(name: str) -> Pattern:
    """Read a pattern off its name. Dimension 0 of a weight counts its outputs, dimension 1 its inputs.

    Args:
        name: ``"n:m"`` (n of m consecutive inputs live), ``"block:AxB"`` (A outputs times B inputs live or die
            together) or ``"channel"`` (all weights of an output do).

    Raises:
        ValueError: If the name is none of these.

    Example:
        >>> parse_pattern("2:4").sparsity, parse_pattern("block:4x1").fits((8, 3))
        (0.5, True)
    """
    block = name.startswith("block:")
    first, _, second = name.removeprefix("block:").partition("x" if block else ":")
    if name == "channel":
        return Pattern(name, (0, 0))
    if first.isdecimal() and second.isdecimal():
        a, b = int(first), int(second)
        if min(a, b) > 0 and (block or a <= b):
            return Pattern(name, (a, b))
    raise ValueError(
        "Expected argument `pattern` to be 'unstructured', 'n:m' with n <= m, 'block:AxB' or 'channel', but got"
        f" {name!r}."
    )


def group_scores(theta: Tensor, pattern: Pattern) -> Tensor:
    r"""By what groups compete: the mean magnitude of their weights, so that groups of any size compare.

    Where weights compete within their group, those that stay whatever happens have an infinite score.

    Args:
        theta: Weights, shape ``(out, in, *)``; sharded ones are gathered on every rank, all of which must enter.
        pattern: The groups.

    Returns:
        One score per group (per weight for ``"n:m"``), any shape, not sharded.

    Example:
        >>> theta = torch.tensor([[1.0, -3.0, 2.0, 0.0]])
        >>> group_scores(theta, parse_pattern("block:1x2")), group_scores(theta, parse_pattern("2:4"))
        (tensor([[2., 1.]]), tensor([[1., inf, inf, 0.]]))
    """
    magnitudes, members = pattern.split(whole(theta.detach()).abs())
    if not pattern.within:
        return magnitudes.mean(members)
    (dim,), (kept, _) = members, pattern.numbers
    order = magnitudes.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, kept)
    return magnitudes.scatter(dim, order, math.inf).view(theta.shape)


def spread_groups(values: Tensor, theta: Tensor, pattern: Pattern) -> Tensor:
    """Give each weight the value of its group.

    Args:
        values: One per group, laid out like :func:`group_scores`.
        theta: The weights.
        pattern: The groups.

    Returns:
        Tensor of the shape of ``theta``, sharded like it.

    Example:
        >>> spread_groups(torch.tensor([[True, False]]), torch.zeros(1, 4), parse_pattern("block:1x2"))
        tensor([[ True,  True, False, False]])
    """
    if pattern.within:
        return spread(values, theta)
    like, members = pattern.split(torch.empty(theta.shape, device="meta"))
    for dim in members:
        values = values.unsqueeze(dim)
    return spread(values.expand(like.shape).reshape(theta.shape), theta)


def vanishing_thresholds(theta: Tensor, pattern: Pattern) -> Tensor:
    r"""The soft thresholds from which on groups are zero: their norms, so that groups of any size compare.

    .. math:: \lVert \theta_g \rVert = \Big(\frac{1}{|g|} \sum_{i \in g} \theta_i^2\Big)^{1/2}

    Where weights compete within their group: the magnitudes of those that may go, the m - n smallest of each group.

    Args:
        theta: Weights, shape ``(out, in, *)``; sharded ones are gathered on every rank, all of which must enter.
        pattern: The groups.

    Returns:
        One number per group, laid out like :func:`group_scores` (m - n numbers per group for ``"n:m"``), at least
        float32, not sharded.

    Example:
        >>> theta = torch.tensor([[1.0, -7.0, 2.0, 0.0]])
        >>> vanishing_thresholds(theta, parse_pattern("block:1x2")), vanishing_thresholds(theta, parse_pattern("2:4"))
        (tensor([[5.0000, 1.4142]]), tensor([[[0., 1.]]]))
    """
    full = whole(theta.detach())
    groups, members = pattern.split(full.to(torch.promote_types(full.dtype, torch.float32)))
    if not pattern.within:
        return groups.square().mean(members).sqrt_()
    (dim,), (kept, of) = members, pattern.numbers
    return groups.abs().sort(dim=dim).values.narrow(dim, 0, of - kept)


def group_exceeds(theta: Tensor, pattern: Pattern, threshold: Tensor | float) -> Tensor:
    """The weights that :func:`group_soft_threshold` keeps.

    Args:
        theta: Weights, shape ``(out, in, *)``; sharded ones are gathered on every rank, all of which must enter.
        pattern: The groups.
        threshold: Number or scalar tensor.

    Returns:
        Boolean tensor like ``theta``, True = kept; NaN is kept, so that it stays in sight.

    Example:
        >>> group_exceeds(torch.tensor([[1.0, -7.0, 2.0, 0.0]]), parse_pattern("block:1x2"), 2.0)
        tensor([[ True,  True, False, False]])
    """
    if not pattern.within:
        return spread_groups(~(vanishing_thresholds(theta, pattern) <= threshold), theta, pattern)
    return like(~(local(theta).abs() <= _bound(theta, pattern, threshold)), theta)


def group_soft_threshold(
    theta: Tensor, pattern: Pattern, threshold: Tensor | float = math.inf, *, out: Tensor | None = None
) -> Tensor:
    r"""Shrink every group by the threshold, to zero at least.

    .. math:: w_g = \theta_g \max\Big(1 - \frac{\tau}{\lVert \theta_g \rVert}, 0\Big)

    with the norm of :func:`vanishing_thresholds`: the proximal operator of the group lasso. Where weights compete
    within their group, each of them is shrunk on its own, but by no more than the largest of those that may go, so that
    n of m are left at least (fewer only if some are equal):

    .. math:: w = \operatorname{sign}(\theta) \max(|\theta| - \min(\tau, \tau_g), 0)

    with :math:`\tau_g` the (m - n)-th smallest magnitude of the group.

    Args:
        theta: Weights, shape ``(out, in, *)``; sharded ones are gathered on every rank, all of which must enter.
        pattern: The groups.
        threshold: Non-negative number or scalar tensor :math:`\tau`; infinite for all that may go.
        out: Where to write the result; must not share memory with ``theta``.

    Returns:
        Tensor like ``theta``.

    References:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006; for ``"n:m"`` Hu et
        al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", NeurIPS 2024,
        https://arxiv.org/abs/2409.09099.

    Example:
        >>> theta = torch.tensor([[1.0, -7.0, 2.0, 0.5]])
        >>> group_soft_threshold(theta, parse_pattern("block:1x2"), 2.0)
        tensor([[ 0.6000, -4.2000,  0.0000,  0.0000]])
        >>> group_soft_threshold(theta, parse_pattern("2:4"))
        tensor([[ 0., -6.,  1.,  0.]])
    """
    out = torch.empty_like(theta) if out is None else out
    if not pattern.within:
        norms = vanishing_thresholds(theta, pattern)
        factors = ((norms - threshold) / norms).masked_fill_(norms <= threshold, 0.0).to(theta.dtype)
        shrink = local(spread_groups(factors, theta, pattern))
        # A sum, as 0 * -1 is -0.
        torch.addcmul(torch.zeros((), dtype=theta.dtype, device=theta.device), local(theta), shrink, out=local(out))
        return out
    kept, of = pattern.numbers
    if kept == of:
        return out.copy_(theta)
    bound = _bound(theta, pattern, threshold)
    torch.sub(local(theta), torch.clamp(local(theta), -bound, bound), out=local(out))
    return out


def _bound(theta: Tensor, pattern: Pattern, threshold: Tensor | float) -> Tensor:
    """By how much each weight is shrunk that competes within its group; of a sharded one, the part on this rank."""
    kept, of = pattern.numbers
    magnitudes, (dim,) = pattern.split(whole(theta.detach()).abs())
    largest = magnitudes.kthvalue(of - kept, dim, keepdim=True).values.clamp_(max=threshold)
    return local(spread(largest.expand_as(magnitudes).reshape(theta.shape), theta))
