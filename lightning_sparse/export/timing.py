"""Which of several calls is faster, on a machine that is never quite idle."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median

__all__ = ["time_calls"]


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int = 7,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time calls side by side.

    Each round has every call once, in an order drawn anew, so that what else the machine does strikes all alike. Give
    one of the calls twice, under two names: the ratio of the two says how far the others can be trusted.

    Args:
        calls: What to time, by name. Each is called once beforehand, which compiles what is compiled.
        seconds: How long all rounds together may take, > 0; short calls get more rounds for it.
        rounds: The least number of rounds, >= 1, however long they take.
        seed: Of the orders.
        clock: What tells the seconds. Where other programs disturb, `time.thread_time` counts only what the calling
            thread has run, if that does all the work.

    Returns:
        Median of the seconds that each call took, by name.

    Raises:
        ValueError: If there is no round to measure.

    Example:
        >>> import time
        >>> times = time_calls({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, seconds=0.1)
        >>> times["short"] < times["long"]
        True
    """
    if rounds < 1:
        raise ValueError(f"Expected argument `rounds` to be at least 1, but got {rounds}.")
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(seed)  # noqa: S311  # nothing here is secret
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        draw.shuffle(order)
        for name in order:
            begin = clock()
            calls[name]()
            taken[name].append(clock() - begin)
        done += 1
    return {name: median(times) for name, times in taken.items()}
