"""Intervals against slow references, scipy's own bootstrap, and cases with a known answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from features.errors import InputError
from study.report.statistics import (
    Effect,
    Interval,
    Sample,
    Spread,
    UserTotals,
    combine,
    difference_over_users,
    effect,
    holm,
    interval_over_users,
    opposite_signs,
    pool,
    pooled_spread,
    power,
    samples,
    seed_interval,
    seeds_needed,
    small_telescopes,
    users_needed,
)  # fmt: skip
from trainables.task_types import RATINGS

from ..store import per_user, pooled


def totals_of(frame: pd.DataFrame, place: str = "per_user.csv") -> UserTotals:
    return UserTotals.from_frame(frame, RATINGS.metrics, place)


def bootstrap(frame: pd.DataFrame, resamples: int = 2_000, seed: int = 0) -> dict[str, Interval]:
    drawn = samples(totals_of(frame), resamples=resamples, seed=seed)
    return {name: interval_over_users(sample) for name, sample in drawn.items()}


def rmse_difference(ours: pd.DataFrame, theirs: pd.DataFrame, resamples: int = 2_000) -> Interval:
    one, two = (samples(totals_of(frame), resamples=resamples)["rmse"] for frame in (ours, theirs))
    return difference_over_users(one, two)


def test_point_estimates_pool_all_ratings_per_seed_and_average_seeds() -> None:
    frame = per_user(40, 1.1, [0, 1, 2], draw=3)
    got = bootstrap(frame, resamples=10)
    want = pooled(frame)
    assert {f"test_{name}": interval.value for name, interval in got.items()} == pytest.approx(want, rel=1e-12)
    per_user_rmse = np.sqrt(frame["sum_squared_error"] / frame["n"]).mean()
    assert abs(per_user_rmse - got["rmse"].value) > 1e-3  # a mean of users' RMSEs is another number


def test_interval_agrees_with_scipys_bootstrap() -> None:
    frame = per_user(200, 1.0, [0], draw=5)
    ours = bootstrap(frame, resamples=4_000)["rmse"]

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
        interval = bootstrap(per_user(80, 1.0, [0], draw), resamples=400)["rmse"]
        covered += interval.low <= 1.0 <= interval.high
    assert (
        178 <= covered <= 199
    )  # 95% of 200 is 190; 3.9 standard deviations below, percentile intervals run a little short


def test_paired_difference_finds_no_effect_where_there_is_none_and_is_narrower_than_unpaired() -> None:
    false_alarms = 0
    for draw in range(200):
        ours, theirs = (per_user(60, 1.0, [0], 2 * draw + k) for k in (0, 1))
        interval = rmse_difference(ours, theirs, resamples=400)
        false_alarms += not interval.low <= 0 <= interval.high
    assert 1 <= false_alarms <= 22  # 5% of 200 is 10

    base = per_user(60, 1.0, [0], 7)
    better = base.assign(sum_squared_error=base["sum_squared_error"] * 0.98)  # every user 1% better
    paired = rmse_difference(better, base)
    assert paired.high < 0
    assert paired.half_width < 0.1 * bootstrap(base)["rmse"].half_width


def test_seeds_and_row_order_change_nothing_the_bootstrap_seed_does() -> None:
    frame = per_user(50, 1.0, [0, 1], draw=1)
    shuffled = frame.sample(frac=1, random_state=0)
    first, again = (bootstrap(rows) for rows in (frame, shuffled))
    assert first == again
    assert bootstrap(frame, seed=1)["rmse"].low != first["rmse"].low


def test_blocks_do_not_change_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = per_user(30, 1.0, [0], draw=1)
    whole = bootstrap(frame, resamples=100)
    monkeypatch.setattr("study.report.statistics._BLOCK_ELEMENTS", 7 * 30)
    blocked = bootstrap(frame, resamples=100)
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
        totals_of(spoil(per_user(5, 1.0, [0, 1], draw=1)), place="run x")
    assert "\n" not in str(caught.value)


def test_rows_of_different_users_are_not_compared() -> None:
    with pytest.raises(InputError, match="same test users and counts, got 5 and 6 users"):
        totals_of(per_user(5, 1.0, [0], draw=1)).check_paired(totals_of(per_user(6, 1.0, [0], draw=1)))


# --- effects, many comparisons, power -----------------------------------------------------------------------------


def two_ways(rng: np.random.Generator, users: int, seeds: int, better: float) -> tuple[Sample, Sample]:
    """Two configurations of the same users and seeds, `better` apart: users and seeds each move the difference."""
    level = rng.normal(3, 1, (users, 1))
    found = []
    for shift in (better, 0.0):
        values = level + shift + rng.normal(0, 0.5, (users, 1)) + rng.normal(0, 0.1, (1, seeds))
        values = values + rng.normal(0, 0.2, (users, seeds))
        found.append(Sample(values, tuple(range(seeds)), tuple(map(str, range(users)))))
    return found[0], found[1]


def of_seeds(*values: float, fixed: bool = False) -> Sample:
    """One user, so that nothing varies but the seeds."""
    return Sample(np.asarray([values]), tuple(range(len(values))), ("u",), fixed=fixed)


def test_an_effect_is_paired_by_seed_and_user() -> None:
    frames = [per_user(60, sigma, [0, 1, 2], 3) for sigma in (0.9, 1.0)]
    ours, theirs = (samples(totals_of(frame))["rmse"] for frame in frames)
    found = effect(ours, theirs, higher=False)
    assert found.value == pytest.approx(pooled(frames[1])["test_rmse"] - pooled(frames[0])["test_rmse"])
    assert (found.seeds, found.users, found.paired) == (3, 60, True)
    differences = theirs.by_seed - ours.by_seed
    assert found.seed_variance == pytest.approx(np.var(differences, ddof=1) / 3)
    want = rmse_difference(*frames)
    assert 2 * 1.96 * math.sqrt(found.user_variance) == pytest.approx(want.high - want.low, rel=0.1)
    assert found.tail() < 1e-4
    assert found.tail(-1) > 1 - 1e-4
    apart = effect(ours, replace(theirs, users=("others",) * 60), higher=False)
    assert apart.user_variance > 5 * found.user_variance


def test_seeds_alone_are_a_paired_t_test() -> None:
    ours, theirs = [0.91, 0.93, 0.95, 0.9], [0.96, 0.95, 0.99, 0.97]
    found = effect(of_seeds(*ours), of_seeds(*theirs), higher=False)
    want = stats.ttest_rel(theirs, ours)
    assert 2 * found.tail() == pytest.approx(want.pvalue)
    ends = want.confidence_interval(0.95)
    assert (found.interval().low, found.interval().high) == pytest.approx((ends.low, ends.high))
    assert (found.user_variance, found.freedom) == (0, 3)


def test_without_an_effect_the_stated_share_is_significant_and_with_one_the_stated_power_is_met() -> None:
    rng = np.random.default_rng(0)
    nothing = [effect(*two_ways(rng, 60, 4, 0.0), higher=True) for _ in range(500)]
    alarms = sum(2 * min(each.tail(), each.tail(-1)) < 0.05 for each in nothing)
    assert 12 <= alarms <= 40  # 5% of 500 is 25
    covered = sum(each.interval().low <= 0 <= each.interval().high for each in nothing)
    assert covered == 500 - alarms
    size = 0.35
    foreseen = np.mean([power(each, size, 0.025) for each in nothing])
    seen = np.mean([effect(*two_ways(rng, 60, 4, size), higher=True).tail() < 0.025 for _ in range(500)])
    assert 0.6 < foreseen < 0.95
    assert seen == pytest.approx(foreseen, abs=0.08)


def test_one_seed_borrows_the_spread_of_others_or_decides_nothing() -> None:
    one, two = of_seeds(0.5), of_seeds(0.4)
    alone = effect(one, two, higher=True)
    assert (alone.tail(), alone.tail(-1)) == (1.0, 1.0)
    spread = pooled_spread([[0.1, 0.2, 0.3], [0.5], [0.4, 0.6]])
    assert spread == Spread(variance=pytest.approx((0.02 + 0.02) / 3), freedom=3)  # type: ignore[arg-type]
    found = effect(one, two, higher=True, spread=spread)
    assert found.seed_variance == pytest.approx(2 * 0.04 / 3)
    assert found.freedom == pytest.approx(3)
    fixed = effect(one, of_seeds(0.4, fixed=True), higher=True, spread=spread)
    assert fixed.seed_variance == pytest.approx(0.04 / 3)
    assert pooled_spread([[0.1]]) is None


@pytest.mark.parametrize(("size", "needed"), [(1.0, 10), (0.8, 15), (0.5, 34)])
def test_seeds_needed_are_those_of_power_tables(size: float, needed: int) -> None:
    """One-sample t test, one-sided 0.025, power 0.8: Cohen's d and its n."""
    found = Effect(value=0.1, seeds=3, seed_variance=1 / 3, seed_freedom=2.0, users=1, user_variance=0.0)
    assert seeds_needed(found, size, 0.025) == needed
    assert power(found.at(needed), size, 0.025) >= 0.8 > power(found.at(needed - 1), size, 0.025)


def test_more_seeds_do_not_help_where_users_differ_too_much() -> None:
    found = Effect(value=0.1, seeds=3, seed_variance=0.01, seed_freedom=2.0, users=50, user_variance=0.04)
    assert seeds_needed(found, 0.1, 0.025) is None
    assert power(found.at(3, 10**7), 0.1, 0.025) < 0.2, "so three seeds are too few for any number of users"
    both = users_needed(found, 0.1, 0.025)
    assert both is not None
    users, seeds = both
    assert seeds == math.ceil(3 * users / 50)
    assert 50 * 0.05 / users * 2.8**2 == pytest.approx(0.01, rel=0.05)  # (1.96 + 0.84) standard errors
    assert power(found.at(seeds, users), 0.1, 0.025) >= 0.8 > power(found.at(seeds, users - 1), 0.1, 0.025)
    assert users_needed(found, 0.001, 0.025) is None


def test_more_users_are_asked_for_at_the_seeds_at_hand_where_they_are_enough() -> None:
    found = Effect(value=0.1, seeds=3, seed_variance=0.0005, seed_freedom=2.0, users=50, user_variance=0.04)
    both = users_needed(found, 0.1, 0.025)
    assert both is not None
    users, seeds = both
    assert seeds == 3
    assert power(found.at(3, users), 0.1, 0.025) >= 0.8 > power(found.at(3, users - 1), 0.1, 0.025)
    assert power(found.at(3, 50_000), 0.1, 0.025) < 0.7, "three seeds alone have two degrees of freedom"


def test_corrections_have_their_textbook_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    families = np.random.default_rng(1).random((2_000, 12))
    assert np.mean([min(holm(list(tails))) < 0.05 for tails in families]) == pytest.approx(0.049, abs=0.015)


def test_a_tail_is_against_its_margin() -> None:
    found = Effect(value=0.02, seeds=3, seed_variance=0.0, seed_freedom=2.0, users=101, user_variance=1e-4)
    assert found.tail(1, 0.01) == pytest.approx(stats.t.sf(1.0, 100))
    assert found.tail(-1, 0.04) == pytest.approx(stats.t.sf(2.0, 100))
    assert found.tail(-1, 0.02) == pytest.approx(0.5)
    certain = replace(found, user_variance=0.0)
    assert [certain.tail(1, 0.01), certain.tail(-1, 0.01), certain.tail(1, 0.02)] == [0.0, 1.0, 1.0]


def test_users_and_seeds_are_crossed() -> None:
    """The variance of the mean of a two-way table, by its mean squares, written out."""
    table = np.random.default_rng(3).normal(0, 1, (7, 4)) + np.arange(7)[:, None] + 2.0 * np.arange(4)
    zero = Sample(np.zeros((7, 4)), (0, 1, 2, 3), tuple("abcdefg"))
    found = effect(replace(zero, table=table), zero, higher=True)
    rows, columns, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    rest = sum((table[u, s] - rows[u] - columns[s] + mean) ** 2 for u in range(7) for s in range(4)) / (6 * 3)
    assert found.user_variance == pytest.approx(sum((rows - mean) ** 2) / 6 / 7)
    assert found.seed_variance == pytest.approx(sum((columns - mean) ** 2) / 3 / 4)
    assert found.both_variance == pytest.approx(rest / 28)
    crossed = found.user_variance + found.seed_variance - found.both_variance
    assert found.error == pytest.approx(math.sqrt(crossed))
    only_users = replace(found, seed_variance=0.0, both_variance=0.1)
    assert only_users.error == pytest.approx(math.sqrt(found.user_variance)), "never less than one of the two"
    more = found.at(8, 70)
    assert more.both_variance == pytest.approx(found.both_variance / 20)
    assert more.seed_variance - more.both_variance == pytest.approx((found.seed_variance - found.both_variance) / 2)


def test_the_crossed_error_is_that_of_repeated_studies() -> None:
    rng = np.random.default_rng(5)
    found = [effect(*two_ways(rng, 60, 4, 0.0), higher=True) for _ in range(600)]
    spread = np.std([each.value for each in found])
    assert np.sqrt(np.mean([each.error**2 for each in found])) == pytest.approx(spread, rel=0.08)
    twice = np.sqrt(np.mean([each.user_variance + each.seed_variance for each in found]))
    assert twice > 1.02 * spread, "without what is shared, it would be counted twice"


def test_one_less_the_mean_of_others_shares_their_users() -> None:
    rng = np.random.default_rng(6)
    level = rng.normal(0, 1, (50, 1))
    arms = [Sample(level + rng.normal(k, 0.1, (50, 3)), (0, 1, 2), tuple(map(str, range(50)))) for k in range(3)]
    found = combine([(1.0, arms[2]), (-0.5, arms[0]), (-0.5, arms[1])])
    assert found.value == pytest.approx(arms[2].value - (arms[0].value + arms[1].value) / 2)
    assert found.user_variance < 0.01 * combine([(1.0, arms[2])]).user_variance


def test_the_mean_of_cells_pools_their_variances() -> None:
    one = Effect(value=0.1, seeds=3, seed_variance=0.01, seed_freedom=2.0, users=100, user_variance=0.04)
    two = replace(one, value=0.3, users=400, user_variance=0.01, both_variance=0.004)
    apart = pool([(0.5, one), (0.5, two)], ["a->b", "b->a"])
    assert (apart.value, apart.users) == (pytest.approx(0.2), 500)
    assert apart.user_variance == pytest.approx((0.04 + 0.01) / 4)
    assert (apart.seed_variance, apart.seed_freedom) == (pytest.approx(0.005), pytest.approx(4.0))
    assert apart.both_variance == pytest.approx(0.001)
    nested = pool([(0.5, one), (0.5, two)], ["a->b", "a->b"])
    assert nested.user_variance == pytest.approx((0.04 + 0.01 + 2 * 0.5 * 0.2 * 0.1) / 4), "100 of the 400 users"
    less = pool([(1.0, one), (-1.0, two)], ["a->b", "a->b"])
    assert (less.value, less.user_variance) == (pytest.approx(-0.2), pytest.approx(0.05))


def test_opposite_signs_have_the_critical_values_of_gail_and_simon() -> None:
    """Their Table 1 at 5%: 2.71 for two groups, 4.23 for three, 5.43 for four."""

    def at(ratio: float, groups: int) -> float:
        values = [-math.sqrt(ratio), *[10.0] * (groups - 1)]
        cells = [
            Effect(value=v, seeds=1, seed_variance=0.0, seed_freedom=1.0, users=9, user_variance=1.0) for v in values
        ]
        return opposite_signs(cells)

    assert [at(q, k) for q, k in ((2.71, 2), (4.23, 3), (5.43, 4))] == pytest.approx([0.05] * 3, abs=0.0005)
    assert at(0.0, 3) == 1.0


def test_small_telescopes_see_a_third_of_the_time() -> None:
    found = Effect(value=0.0, seeds=3, seed_variance=1.0, seed_freedom=2.0, users=400, user_variance=0.01)
    size = small_telescopes(found, 100)
    assert stats.norm.sf(1.96 - size / 0.2) == pytest.approx(1 / 3, abs=0.001)
