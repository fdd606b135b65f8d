"""Numbers that YAML reads as text: quoted ones, and forms such as 1e-5, which YAML 1.1 takes for a word."""

from __future__ import annotations

import math


def number_remedy(text: str) -> str:
    """Return what to write so that YAML reads the number of a text, such as "write 1.0e-5"; "" for any other text."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    if "e" not in text.lower():
        return f"write {text} without quotes"
    mantissa, _, exponent = f"{number:e}".partition("e")
    return f"write {float(mantissa)}e{exponent[0]}{exponent[1:].lstrip('0') or '0'}"
