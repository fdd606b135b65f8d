"""Checks of the fields of specs and configs.

Each check looks at one field and returns the fault in words ("lr is -1; give a number above 0"), or "" where the field is
as it should be. `refuse` raises all faults at once.
"""

from __future__ import annotations

import math
from typing import Any

from features.errors import InputError


def choice(config: Any, name: str, choices: tuple[str, ...]) -> str:
    """Check that the field is one of the choices."""
    value = getattr(config, name)
    return "" if value in choices else f"{name} is {value!r}; choose from {', '.join(choices)}"


def flag(config: Any, name: str) -> str:
    """Check that the field is true or false."""
    value = getattr(config, name)
    return "" if isinstance(value, bool) else f"{name} is {value!r}; give true or false"


def number(
    config: Any,
    name: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> str:
    """Check that the field is a finite number within its bounds; `above` and `below` are excluded."""
    value = getattr(config, name)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    finite = numeric and is_finite(value)
    if finite and _within(value, least, above, most, below):
        return ""
    bounded = (least, above) != (None, None) and (most, below) != (None, None)
    noun = "number" if bounded or not numeric or finite else "finite number"
    return f"{name} is {value!r}; give a {_described(noun, least, above, most, below)}"


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float: a whole number may be beyond the range of floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def whole(config: Any, name: str, *, least: int | None = None, most: int | None = None) -> str:
    """Check that the field is a whole number within its bounds."""
    value = getattr(config, name)
    if isinstance(value, int) and not isinstance(value, bool) and _within(value, least, None, most, None):
        return ""
    return f"{name} is {value!r}; give a {_described('whole number', least, None, most, None)}"


def multiple(config: Any, name: str, factor: int) -> str:
    """Check that the field is a positive multiple of `factor`."""
    value = getattr(config, name)
    good = isinstance(value, int) and value > 0 and value % factor == 0
    return "" if good else f"{name} is {value!r}; give a multiple of {factor}"


def at_least(config: Any, name: str, least: float) -> str:
    """Check that the field is a finite number of at least `least`."""
    return number(config, name, least=least)


def dropout_share(config: Any) -> str:
    """Check `dropout`, a share of at least 0 and below 1."""
    return number(config, "dropout", least=0, below=1)


def step_size(config: Any) -> str:
    """Check `lr`, the optimiser's learning rate."""
    return number(config, "lr", above=0)


def variance_range(config: Any) -> str:
    """Check `variance_start` and `variance_end`, beta_1 and beta_T of a diffusion."""
    if 0 < config.variance_start <= config.variance_end < 1:
        return ""
    return (
        f"variance_start is {config.variance_start}, variance_end {config.variance_end}; "
        "give 0 < variance_start <= variance_end < 1"
    )


def refuse(*faults: str, place: str = "") -> None:
    """Raise an InputError with all faults, each behind `place` ("encoder."), where there are any."""
    if present := [f"{place}{fault}" for fault in faults if fault]:
        raise InputError("; ".join(present))


def _within(value: float, least: float | None, above: float | None, most: float | None, below: float | None) -> bool:
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )  # fmt: skip


def _described(noun: str, least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    """The rule in words, such as "finite number above 0, up to 1"."""
    if least is not None and most is not None:
        return f"{noun} from {least} to {most}"
    words = (
        ("of at least", least), ("above", above), ("up to", most), ("below", below),
    )  # fmt: skip
    bounds = ", ".join(f"{word} {bound}" for word, bound in words if bound is not None)
    return f"{noun} {bounds}".strip()
