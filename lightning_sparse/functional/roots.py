"""The number that makes a sum over all weights come out right."""

import math
from collections.abc import Callable

__all__ = ["find_root"]


def find_root(function: Callable[[float], tuple[float, float]], start: float, width: float, tolerance: float) -> float:
    """Find where a decreasing function is zero: by Newton's method, and by bisection where that leads astray.

    Args:
        function: From a number to value and slope; positive far to the left, negative far to the right.
        start: A guess.
        width: Length of the longest step as long as the root is only known to lie on one side; doubles each time.
        tolerance: Value that counts as zero.

    Returns:
        The root; where the function is flat there, one of them.

    Example:
        >>> find_root(lambda x: (2.0 - x * x * x, -3 * x * x), 0.0, 1.0, 1e-12)
        1.2599
    """
    low, high, x = -math.inf, math.inf, start
    for _ in range(200):
        value, slope = function(x)
        if abs(value) <= tolerance:
            break
        low, high = (x, high) if value > 0.0 else (low, x)
        step = -value / slope if slope else math.copysign(math.inf, value)
        if math.isinf(high - low):
            step, width = max(-width, min(width, step)), 2 * width
        following = x + step if x + step == x or low < x + step < high else 0.5 * (low + high)
        if following == x:
            break
        x = following
    return x
