"""What would end an undecided comparison: how many seeds, or users, show that it is above 0 or below its margin."""

from __future__ import annotations

import math

from study.report.statistics import Effect, seeds_needed, users_needed


def need(effect: Effect, margin: float | None, level: float) -> str:
    """Return what it takes to see, at `level`, the easier of two things if the truth is what was measured.

    These are that the effect is above 0, and that it is below the margin: at least half of the margin lies between it and
    one of the two.
    """
    if math.isnan(effect.error):
        return "needs at least 2 seeds: nothing in this cell tells how seeds vary"
    below = -math.inf if margin is None else margin - effect.value
    size = max(effect.value, below)
    if size <= 0:
        return "the paper states no size, so nothing but a difference above or below 0 would end it"
    what = "above 0" if effect.value >= below else "below the margin"
    seeds = seeds_needed(effect, size, level)
    if seeds is not None:
        return f"about {seeds} seeds would show it {what}"
    both = users_needed(effect, size, level)
    if both is None:
        return f"no number of seeds shows it {what} on {effect.users:,} users"
    users, seeds = both
    more = f" and {seeds:,} seeds" if seeds > effect.seeds else ""
    return f"about {users:,} users{more} would show it {what}"
