"""Intervals against slow references, scipy's own bootstrap, and cases with a known answer."""

from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from features.errors import InputError
from study.statistics import UserErrors, bootstrap, paired_difference, seed_interval
from trainables.kinds import RATINGS

from .store import per_user, pooled


def errors_of(frame: pd.DataFrame, place: str = "per_user.csv") -> UserErrors:
    return UserErrors.from_frame(frame, RATINGS.metrics, place)


def test_point_estimates_pool_all_ratings_per_seed_and_average_seeds() -> None:
    frame = per_user(40, 1.1, [0, 1, 2], draw=3)
    got = bootstrap(errors_of(frame), resamples=10)
    want = pooled(frame)
    assert {f"test_{name}": interval.value for name, interval in got.items()} == pytest.approx(want, rel=1e-12)
    per_user_rmse = np.sqrt(frame["sum_squared_error"] / frame["n"]).mean()
    assert abs(per_user_rmse - got["rmse"].value) > 1e-3  # a mean of users' RMSEs is another number


def test_interval_agrees_with_scipys_bootstrap() -> None:
    frame = per_user(200, 1.0, [0], draw=5)
    ours = bootstrap(errors_of(frame), resamples=4_000)["rmse"]

    def rmse(n: np.ndarray, squared: np.ndarray, axis: int) -> np.ndarray:
        return np.sqrt(squared.sum(axis=axis) / n.sum(axis=axis))

    data = (frame["n"].to_numpy(), frame["sum_squared_error"].to_numpy())
    theirs = stats.bootstrap(data, rmse, paired=True, n_resamples=4_000, method="percentile", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.08 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.08 * width)


def test_interval_covers_the_truth_at_its_stated_rate() -> None:
    covered = 0
    for draw in range(200):
        interval = bootstrap(errors_of(per_user(80, 1.0, [0], draw)), resamples=400)["rmse"]
        covered += interval.low <= 1.0 <= interval.high
    assert (
        178 <= covered <= 199
    )  # 95% of 200 is 190; 3.9 standard deviations below, percentile intervals run a little short


def test_paired_difference_finds_no_effect_where_there_is_none_and_is_narrower_than_unpaired() -> None:
    false_alarms = 0
    for draw in range(200):
        ours, theirs = (errors_of(per_user(60, 1.0, [0], 2 * draw + k)) for k in (0, 1))
        interval = paired_difference(ours, theirs, resamples=400)["rmse"]
        false_alarms += not interval.low <= 0 <= interval.high
    assert 1 <= false_alarms <= 22  # 5% of 200 is 10

    base = per_user(60, 1.0, [0], 7)
    better = base.assign(sum_squared_error=base["sum_squared_error"] * 0.98)  # every user 1% better
    paired = paired_difference(errors_of(better), errors_of(base))["rmse"]
    assert paired.high < 0
    assert paired.half_width < 0.1 * bootstrap(errors_of(base))["rmse"].half_width


def test_seeds_and_row_order_change_nothing_the_bootstrap_seed_does() -> None:
    frame = per_user(50, 1.0, [0, 1], draw=1)
    shuffled = frame.sample(frac=1, random_state=0)
    first, again = (bootstrap(errors_of(rows)) for rows in (frame, shuffled))
    assert first == again
    assert bootstrap(errors_of(frame), seed=1)["rmse"].low != first["rmse"].low


def test_2000_resamples_of_1000_users_take_well_under_a_second() -> None:
    errors = errors_of(per_user(1_000, 1.0, [0, 1, 2], draw=1))
    start = time.perf_counter()
    bootstrap(errors)
    assert time.perf_counter() - start < 1.0


def test_blocks_do_not_change_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = errors_of(per_user(30, 1.0, [0], draw=1))
    whole = bootstrap(errors, resamples=100)
    monkeypatch.setattr("study.statistics._BLOCK_ELEMENTS", 7 * 30)
    blocked = bootstrap(errors, resamples=100)
    for name, interval in whole.items():
        assert (blocked[name].low, blocked[name].high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_seed_interval_is_students_t() -> None:
    values = [0.91, 0.93, 0.95]
    got = seed_interval(values)
    assert got.value == pytest.approx(0.93)
    assert got.half_width == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)  # t(0.975, 2) from a table
    assert got.n == 3
    alone = seed_interval([0.9])
    assert alone.value == 0.9
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    with pytest.raises(InputError, match="finite values of at least one seed"):
        seed_interval([0.9, math.nan])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.drop(columns="n"), "run x: needs the columns .* lacks n"),
        (lambda f: f.iloc[1:], "every seed needs the same users"),
        (lambda f: f.assign(sum_squared_error=math.nan), "finite numbers"),
        (lambda f: f.iloc[[0, 0]], "one row per seed and user"),
        (lambda f: f.assign(n=0), "a user's n is at least 1 and the same for all seeds"),
    ],
)
def test_a_bad_per_user_file_is_one_line(spoil, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message) as caught:
        errors_of(spoil(per_user(5, 1.0, [0, 1], draw=1)), place="run x")
    assert "\n" not in str(caught.value)


def test_rows_of_different_users_are_not_compared() -> None:
    with pytest.raises(InputError, match="same test users and counts, got 5 and 6 users"):
        paired_difference(*(errors_of(per_user(users, 1.0, [0], draw=1)) for users in (5, 6)))
