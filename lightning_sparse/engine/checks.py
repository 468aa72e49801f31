"""Checks of arguments, with one wording for all of them."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["check_choice", "check_fraction", "check_moment", "check_overrides", "check_positive", "check_window"]


def check_fraction(name: str, value: Any, *, one: bool = False) -> None:
    """Refuse anything but a number in ``[0, 1)``, or in ``[0, 1]`` if ``one``."""
    interval = "[0, 1]" if one else "[0, 1)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{name}` to be a number in {interval}, but got {value!r}.")
    if not 0 <= value < 1 and not (one and value == 1):
        raise ValueError(f"Expected argument `{name}` to lie in {interval}, but got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected argument `{name}` to be a positive int, but got {value!r}.")
    if value < 1:
        raise ValueError(f"Expected argument `{name}` to be a positive int, but got {value!r}.")


def check_moment(name: str, value: Any) -> None:
    """Refuse anything but an epoch (int) or a fraction of training (float)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"Expected argument `{name}` to be an int (epoch) or a float in [0, 1] (fraction of training),"
            f" but got {value!r}."
        )
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError(
            f"Expected argument `{name}` to be an int >= 0 (epoch) or a float in [0, 1] (fraction of training),"
            f" but got {value!r}."
        )


def check_window(start: int | float, end: int | float, freeze: int | float | None = None) -> None:
    """Refuse moments that are out of order, as far as that can be told without a Trainer."""
    check_moment("start", start)
    check_moment("end", end)
    if isinstance(start, int) == isinstance(end, int) and end < start:
        raise ValueError(f"Expected argument `end` to be no earlier than `start` = {start!r}, but got {end!r}.")
    if freeze is not None:
        check_moment("freeze", freeze)
        if isinstance(freeze, int) == isinstance(end, int) and freeze < end:
            raise ValueError(f"Expected argument `freeze` to be no earlier than `end` = {end!r}, but got {freeze!r}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse an unknown word, naming the known ones."""
    choices = sorted(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Expected argument `{name}` to be one of {choices}, but got {value!r}.{hint}")


def check_overrides(overrides: Any, *, budget: bool) -> None:
    """Refuse anything but ``{pattern: None}`` and, for methods with a budget, ``{pattern: {"sparsity": fraction}}``."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"Expected argument `overrides` to be a dict of patterns, but got {overrides!r}.")
    for pattern, settings in (overrides or {}).items():
        if settings is None:
            continue
        if not budget or not isinstance(settings, Mapping) or set(settings) != {"sparsity"}:
            allowed = (
                "None (stay dense) or {'sparsity': ...}"
                if budget
                else "None (stay dense), as the method has no budget,"
            )
            raise ValueError(f"Expected `overrides[{pattern!r}]` to be {allowed} but got {settings!r}.")
        check_fraction(f"overrides[{pattern!r}]['sparsity']", settings["sparsity"])
