"""What an undecided claim needs: how many seeds or users would show the published difference, or the measured one."""

from __future__ import annotations

import math

from study.report.claims.contrasts import Contrast
from study.report.statistics import POWER, Effect, power, seeds_needed, users_needed


def need(contrast: Contrast, effect: Effect, levels: tuple[float, float]) -> str:
    """Return what it takes to see the published difference, or the measured one, with POWER; empty where it is seen.

    `levels` are those of two-sided tests of this contrast, for the claim and against it.
    """
    if math.isnan(effect.error):
        return "needs at least 2 seeds: nothing in this cell tells how seeds vary"
    if any(2 * effect.tail(sign) < level for sign, level in zip((1, -1), levels, strict=True)):
        return ""  # the claim waits for comparisons that are not measured
    published = contrast.printed is not None and contrast.printed > 0
    size, which = (contrast.printed or 0.0, "published") if published else (abs(effect.value), "measured")
    if size == 0:
        return "no difference at all was measured"
    against = not published and effect.value < 0
    level = levels[against]
    digits = max(4, 1 - math.floor(math.log10(size)))  # two that say something
    what = f"the {which} difference ({size:.{digits}f}{', against the claim' if against else ''})"
    if published and (chance := power(effect, size, level)) >= POWER:
        smaller = "what there is, is smaller" if effect.interval().high < size else "it is still within the interval"
        return f"{what} would have been seen (power {chance:.0%}); {smaller}"
    seeds = seeds_needed(effect, size, level)
    if seeds is not None:
        return f"needs about {seeds} seeds to see {what}"
    asked = "another data set"
    if (both := users_needed(effect, size, level)) is not None:
        users, seeds = both
        asked = f"about {users:,} users" + (f" and {seeds:,} seeds" if seeds > effect.seeds else "")
    return f"no number of seeds shows {what} on {effect.users:,} users; needs {asked}"
