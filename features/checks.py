"""What the models' configs ask of their fields: each check gives a line of what is wrong, or nothing."""

from __future__ import annotations

import math
from typing import Any

from features.errors import InputError


def choice(config: Any, name: str, known: tuple[str, ...]) -> str:
    """One of the names."""
    value = getattr(config, name)
    return "" if value in known else f"{name} is {value!r}; choose from {', '.join(known)}"


def at_least(config: Any, name: str, least: int) -> str:
    """That number or more, and finite."""
    value = getattr(config, name)
    return "" if least <= value < math.inf else f"{name} is {value}; give a number of at least {least}"


def dropout_share(config: Any) -> str:
    """A share below 1."""
    return "" if 0 <= config.dropout < 1 else f"dropout is {config.dropout}; give a number in [0, 1)"


def step_size(config: Any) -> str:
    """A step size."""
    return "" if 0 < config.lr < math.inf else f"lr is {config.lr}; give a finite number above 0"


def variance_range(config: Any) -> str:
    """beta_1 to beta_T of a diffusion."""
    if 0 < config.variance_start <= config.variance_end < 1:
        return ""
    return (
        f"variance_start is {config.variance_start}, variance_end {config.variance_end}; "
        "give 0 < variance_start <= variance_end < 1"
    )


def refuse(*faults: str) -> None:
    """InputError with all that is wrong, if anything is."""
    if found := [fault for fault in faults if fault]:
        raise InputError("; ".join(found))
