"""How a budget is split between the layers."""

import math
from collections.abc import Sequence

__all__ = ["apportion", "erdos_renyi"]


def erdos_renyi(
    shapes: Sequence[Sequence[int]], sparsity: float, *, kernel: bool = True, costs: Sequence[int] | None = None
) -> list[float]:
    r"""Give each layer a density in proportion to its number of neurons per weight.

    .. math:: d_l = \min\left(1, \epsilon \frac{\sum_d n_{l,d}}{\prod_d n_{l,d}}\right)

    :math:`\epsilon` is chosen so that all layers together have the wanted sparsity. Small layers stay denser.

    Args:
        shapes: Shape of each weight.
        sparsity: Fraction of zeros over all weights, in ``[0, 1)``.
        kernel: Whether the dimensions of the kernel count (ERK); else only the first two do (ER).
        costs: What a weight of each layer costs, if not the same; ``sparsity`` is then a fraction of the costs.

    Returns:
        Sparsity of each layer, in ``[0, 1)``.

    References:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science", 2018, https://arxiv.org/abs/1707.04780 (ER); Evci et al., "Rigging the Lottery: Making All
        Tickets Winners", ICML 2020, https://arxiv.org/abs/1911.11134 (ERK).

    Example:
        >>> [round(share, 4) for share in erdos_renyi([(10, 10), (100, 100)], 0.9)]
        [0.0818, 0.9082]
    """
    sizes = [math.prod(shape) * cost for shape, cost in zip(shapes, costs or [1] * len(shapes), strict=True)]
    counted = [shape if kernel else shape[:2] for shape in shapes]
    raw = [sum(shape) / math.prod(shape) if math.prod(shape) else 0.0 for shape in counted]
    dense: set[int] = set()
    while True:
        free = [index for index in range(len(shapes)) if index not in dense]
        budget = (1.0 - sparsity) * sum(sizes) - sum(sizes[index] for index in dense)
        total = sum(raw[index] * sizes[index] for index in free)
        epsilon = max(0.0, budget / total) if total else 0.0
        full = {index for index in free if epsilon * raw[index] > 1.0}
        if not full:
            return [0.0 if index in dense else 1.0 - epsilon * raw[index] for index in range(len(shapes))]
        # As the authors do: only the densest become dense at once, then the others share what is left.
        dense |= {index for index in full if raw[index] == max(raw[i] for i in full)}


def apportion(total: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """Split a whole number in proportion to weights; what exceeds the room of one is shared by the others.

    Args:
        total: Number to split, at most the sum of ``room``.
        weights: One for each share, finite, ``>= 0``; where all that have room left weigh nothing, the room counts.
        room: Largest size of each share.

    Returns:
        Whole numbers that add up to ``total``; the largest remainders are rounded up, earlier ones first.

    Example:
        >>> apportion(10, [3.0, 1.0, 1.0], [20, 20, 1])
        [7, 2, 1]
    """
    full: set[int] = set()
    while True:
        free = [index for index in range(len(room)) if index not in full]
        left = total - sum(room[index] for index in full)
        weighing: Sequence[float] = weights if any(weights[index] > 0 for index in free) else room
        unit = left / (sum(weighing[index] for index in free) or 1.0)
        over = {index for index in free if unit * weighing[index] > room[index]}
        if not over:
            break
        full |= over
    shares = [float(room[index]) if index in full else unit * weighing[index] for index in range(len(room))]
    parts = [math.floor(share) for share in shares]
    order = sorted(free, key=lambda index: parts[index] - shares[index])
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts
