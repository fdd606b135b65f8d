"""What rows spend, by the clock and summed over their trials, and when they have nothing left."""

from __future__ import annotations

import pytest

from study.engine.budget import BudgetMeter, Spent
from study.specs import Budget

HOUR = 3600.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only place."""
    now = [1000.0]
    monkeypatch.setattr("study.engine.budget.time.monotonic", lambda: now[0])
    return now


def test_trials_side_by_side_cost_once_by_the_clock(clock: list[float]) -> None:
    meter = BudgetMeter({}, clock=0.0, trials={})
    meter.start("a", "music")
    meter.start("b", "cmf")
    clock[0] += 100
    assert meter.end("a") == Spent(clock=100.0, trials=100.0)
    clock[0] += 50
    assert meter.end("b") == Spent(clock=50.0, trials=150.0)


def test_the_clock_is_shared_and_the_hours_of_trials_are_each_row_s_own(clock: list[float]) -> None:
    budgets = {"music": Budget(trial_hours=2.0), "cmf": Budget(trial_hours=3.0), "emcdr": Budget(hours=2.5)}
    meter = BudgetMeter(budgets, clock=0.0, trials={"cmf": 1.5 * HOUR})
    for trial, row in (("a", "music"), ("b", "music"), ("c", "cmf")):
        meter.start(trial, row)
    clock[0] += HOUR
    assert [meter.exhausted(row) for row in ("music", "cmf", "emcdr")] == [True, False, False], "what runs counts"
    assert meter.stopped == {"music": "search.budget.trial_hours: 2 of 2 are spent by row music"}
    for trial in "abc":
        meter.end(trial)
    assert not meter.exhausted("cmf")
    meter.start("d", "cmf")
    clock[0] += 1.5 * HOUR
    assert [meter.exhausted(row) for row in ("music", "cmf", "emcdr")] == [True, True, True]
    assert meter.stopped["cmf"] == "search.budget.trial_hours: 4 of 3 are spent by row cmf"
    assert meter.stopped["emcdr"] == "search.budget.hours: 2.5 of 2.5 are spent"


def test_earlier_calls_count_and_a_row_without_a_budget_goes_on(clock: list[float]) -> None:
    meter = BudgetMeter({"music": Budget(hours=1.0), "cmf": Budget()}, clock=HOUR, trials={})
    assert (meter.exhausted("music"), meter.exhausted("cmf"), meter.exhausted("item_mean")) == (True, False, False)
    assert list(meter.stopped) == ["music"]
