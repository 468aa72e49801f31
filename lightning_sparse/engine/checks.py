"""Checks of arguments, with one wording for all of them."""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "check_amount",
    "check_choice",
    "check_decay",
    "check_fraction",
    "check_moment",
    "check_number",
    "check_overrides",
    "check_patterns",
    "check_positive",
    "check_window",
]


def check_fraction(name: str, value: Any, *, one: bool = False) -> None:
    """Refuse anything but a number in ``[0, 1)``, or in ``[0, 1]`` if ``one``."""
    interval = "[0, 1]" if one else "[0, 1)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{name}` to be a number in {interval}, but got {value!r}.")
    if not 0 <= value < 1 and not (one and value == 1):
        raise ValueError(f"Expected argument `{name}` to lie in {interval}, but got {value!r}.")


def check_amount(unit: str, value: Any) -> None:
    """Refuse FLOPs that are no fraction in ``(0, 1]``, and other units that are no positive integer."""
    if unit != "flops":
        check_positive(unit, value)
        return
    check_fraction(unit, value, one=True)
    if not value:
        raise ValueError(f"Expected argument `{unit}` to be more than 0, but got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected argument `{name}` to be a positive int, but got {value!r}.")
    if value < 1:
        raise ValueError(f"Expected argument `{name}` to be a positive int, but got {value!r}.")


def check_number(name: str, value: Any, *, negative: bool = True, zero: bool = True) -> None:
    """Refuse anything but a finite number, or, unless ``negative``, one from 0 on, or, unless ``zero``, above it."""
    kind = "a finite number" if negative else f"a finite number {'>=' if zero else '>'} 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{name}` to be {kind}, but got {value!r}.")
    if not math.isfinite(value) or (value < 0 and not negative) or (value == 0 and not zero):
        raise ValueError(f"Expected argument `{name}` to be {kind}, but got {value!r}.")


def check_moment(name: str, value: Any) -> None:
    """Refuse anything but an epoch (int) or a fraction of training (float)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"Expected argument `{name}` to be an int (epoch) or a float in [0, 1] (fraction of training),"
            f" but got {value!r}."
        )
    if not value >= 0 or (isinstance(value, float) and value > 1):  # NaN is not >= 0
        raise ValueError(
            f"Expected argument `{name}` to be an int >= 0 (epoch) or a float in [0, 1] (fraction of training),"
            f" but got {value!r}."
        )


def check_window(start: int | float, end: int | float, freeze: int | float | None = None, last: str = "freeze") -> None:
    """Refuse moments that are out of order, as far as that can be told without a Trainer; ``last`` names the third."""
    check_moment("start", start)
    check_moment("end", end)
    if isinstance(start, int) == isinstance(end, int) and end < start:
        raise ValueError(f"Expected argument `end` to be no earlier than `start` = {start!r}, but got {end!r}.")
    if freeze is not None:
        check_moment(last, freeze)
        if isinstance(freeze, int) == isinstance(end, int) and freeze < end:
            raise ValueError(f"Expected argument `{last}` to be no earlier than `end` = {end!r}, but got {freeze!r}.")


def check_decay(name: str, values: Mapping[int | float, float]) -> None:
    """Refuse anything but fractions by the moments from which on they hold, in order, the last of them 0."""
    for (start, value), (end, _) in itertools.pairwise(values.items()):
        check_window(start, end)
        check_fraction(f"{name}[{start!r}]", value)
    if not values or list(values.values())[-1] != 0:
        raise ValueError(f"Expected argument `{name}` to end with 0, but got {values!r}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse an unknown word, naming the known ones."""
    choices = sorted(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Expected argument `{name}` to be one of {choices}, but got {value!r}.{hint}")


def check_patterns(name: str, patterns: Any) -> None:
    """Refuse anything but None or a list of patterns, above all a single string, which is a list of letters."""
    if patterns is None:
        return
    if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        hint = f" Write [{patterns!r}]." if isinstance(patterns, str) else ""
        raise TypeError(f"Expected argument `{name}` to be a list of patterns (str), but got {patterns!r}.{hint}")
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"Expected {pattern!r} in `{name}` to hold a regular expression after `re:`, but got {error}."
                ) from error


def check_overrides(overrides: Any, *, budget: bool) -> None:
    """Refuse anything but ``{pattern: None}`` and, for methods with a budget, ``{pattern: {"sparsity": fraction}}``."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"Expected argument `overrides` to be a dict of patterns, but got {overrides!r}.")
    check_patterns("overrides", list(overrides or ()))
    for pattern, settings in (overrides or {}).items():
        if settings is None:
            continue
        if not budget or not isinstance(settings, Mapping) or set(settings) != {"sparsity"}:
            allowed = (
                "None (stay dense) or {'sparsity': ...},"
                if budget
                else "None (stay dense), as the method has no budget,"
            )
            raise ValueError(f"Expected `overrides[{pattern!r}]` to be {allowed} but got {settings!r}.")
        check_fraction(f"overrides[{pattern!r}]['sparsity']", settings["sparsity"])
