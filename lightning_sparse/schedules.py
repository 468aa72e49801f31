"""Shapes of the ramp: from progress in [0, 1] to the fraction of the way that has been gone, in [0, 1]."""

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "Schedule", "constant", "cosine", "cubic", "linear", "sigmoid_cosine_decay"]

Schedule = Callable[[float], float]


def cubic(progress: float) -> float:
    """Fast at first, then ever slower: ``1 - (1 - progress)^3``.

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - progress) ** 3


def linear(progress: float) -> float:
    """Equal steps.

    Example:
        >>> linear(0.5)
        0.5
    """
    return progress


def cosine(progress: float) -> float:
    """Slow at both ends: ``(1 - cos(pi progress)) / 2``.

    Example:
        >>> round(cosine(0.25), 4)
        0.1464
    """
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def constant(progress: float) -> float:
    """All of it at once, from the start.

    Example:
        >>> constant(0.0)
        1.0
    """
    return 1.0


def sigmoid_cosine_decay(progress: float) -> float:
    """Decay of Gradient Annealing: the larger of a cosine and a sigmoid that falls over ``[-6, 6]``.

    Starts at 1 and ends at ``1 - sigmoid(6) = 0.0025``.

    References:
        Kundu et al., "AutoSparse", 2023, https://arxiv.org/abs/2304.06941.

    Example:
        >>> [round(sigmoid_cosine_decay(p), 4) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0025]
    """
    falling_sigmoid = 1.0 / (1.0 + math.exp(12.0 * progress - 6.0))
    return max(1.0 - cosine(progress), falling_sigmoid)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "cubic": cubic, "linear": linear}
