"""What a search may cost, and what it has cost so far; a row whose budget is spent starts no further trial."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from study.specs import Budget


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds that a search, or a trial of it, has taken."""

    clock: float = 0.0
    """Seconds by the clock, each of which counts once, however many trials run side by side."""
    trials: float = 0.0
    """Sum over trials of the time that each ran."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(clock=self.clock + other.clock, trials=self.trials + other.trials)


class BudgetMeter:
    """Adds up what the rows of a part spend, and says which of them have nothing left."""

    def __init__(self, budgets: Mapping[str, Budget], *, clock: float, trials: Mapping[str, float]) -> None:
        """Go on from what earlier calls spent.

        `budgets`: by row. `clock`: seconds by the clock, all rows together. `trials`: row -> seconds that its trials ran.
        """
        self._budgets = {row: budget for row, budget in budgets.items() if budget != Budget()}
        self._clock = clock
        self._trials = dict(trials)
        self._running: dict[str, tuple[str, float]] = {}
        self._last_end: float | None = None
        self.stopped: dict[str, str] = {}
        """Row -> why no further trial of it starts; a row stays stopped for the rest of the call."""

    def start(self, trial: str, row: str) -> None:
        """Start a trial's clock."""
        now = time.monotonic()
        self._running[trial] = row, now
        if self._last_end is None:
            self._last_end = now

    def end(self, trial: str) -> Spent:
        """Stop a trial's clock; returns its seconds, and those by the clock since the last trial of any row ended."""
        now = time.monotonic()
        row, began = self._running.pop(trial)
        spent = Spent(clock=now - (now if self._last_end is None else self._last_end), trials=now - began)
        self._last_end = now
        self._clock += spent.clock
        self._trials[row] = self._trials.get(row, 0.0) + spent.trials
        return spent

    def exhausted(self, row: str) -> bool:
        """Whether no further trial of the row may start."""
        if row in self.stopped or row not in self._budgets:
            return row in self.stopped
        now, budget = time.monotonic(), self._budgets[row]
        clock = self._clock + (0.0 if self._last_end is None else now - self._last_end)
        running = sum(now - began for other, began in self._running.values() if other == row)
        trials = self._trials.get(row, 0.0) + running
        if budget.hours is not None and clock >= budget.hours * 3600:
            self.stopped[row] = f"search.budget.hours: {clock / 3600:.3g} of {budget.hours:g} are spent"
        elif budget.trial_hours is not None and trials >= budget.trial_hours * 3600:
            self.stopped[row] = (
                f"search.budget.trial_hours: {trials / 3600:.3g} of {budget.trial_hours:g} are spent by row {row}"
            )
        return row in self.stopped
