"""Intervals and tests: over users by bootstrap, over seeds by Student's t, paired wherever two rows share their users.

Legend: U test users, S seeds, B bootstrap resamples.

MAE and RMSE pool every test rating (MuSiC 4.1.2), so a resample of the users adds up their error sums and counts and
divides once; the average of the users' own RMSEs would be another number. HR and NDCG are averaged over users. All samples
of the same number of users share their resamples, which is what pairs their differences.

A comparison is tested on an `Effect`: a difference with the two things it varies by. Its variance is that over training
seeds (of the seeds' differences) plus that over users (of the resampled differences), its test a t test with
Satterthwaite's degrees of freedom. What users and seeds share is counted in both, so the test errs on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtr, stdtrit

from features.errors import InputError
from trainables.task_types import Metric

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2_000
POWER = 0.8  # with which a difference should be seen by the seeds that are asked for
MOST_SEEDS = 1_000  # more are not asked for
_BLOCK_ELEMENTS = 2_000_000  # 16 MB of float64 weights at a time, whatever the number of users


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval; the ends are NaN where `n` observations cannot give one."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half of the interval's length, in the unit of the value."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class UserTotals:
    """What `per_user.csv` says of one group of rows: what each test user adds to each metric."""

    metrics: tuple[Metric, ...]
    users: tuple[str, ...]
    """Sorted."""
    seeds: tuple[int, ...]
    """Sorted."""
    totals: Mapping[str, Floats]
    """Metric -> [U, S]."""
    counts: Mapping[str, Floats]
    """Metric -> [U], the same for all seeds."""

    @property
    def size(self) -> int:
        """Number of ratings or other test cases of all users."""
        return int(self.counts[self.metrics[0].name].sum())

    def check_paired(self, other: UserTotals) -> None:
        """Raise InputError where the other row was not evaluated on the same cases of the same users."""
        counts = all(np.array_equal(self.counts[name], other.counts[name]) for name in self.counts)
        if self.users != other.users or not counts:
            raise InputError(
                f"paired difference: both rows need the same test users and counts, got {len(self.users)} and"
                f" {len(other.users)} users; score both on the same task"
            )

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, metrics: Sequence[Metric], place: str = "per_user.csv") -> UserTotals:
        """Read the columns seed, user and those of the metrics; every seed must hold the same users.

        Raises InputError (starting with `place`) for missing columns, repeated or missing pairs and non-finite values.
        """
        counts = list(dict.fromkeys(metric.count for metric in metrics if metric.count))
        columns = counts + list(dict.fromkeys(metric.total for metric in metrics))
        needed = ["seed", "user", *columns]
        lacking = [name for name in needed if name not in frame.columns]
        if lacking:
            raise InputError(f"{place}: needs the columns {', '.join(needed)}, lacks {', '.join(lacking)}; score again")
        if frame.empty or frame.duplicated(["seed", "user"]).any():
            raise InputError(f"{place}: needs one row per seed and user, has {len(frame)} rows; score again")
        wide = frame.assign(user=frame["user"].astype(str)).pivot(index="user", columns="seed", values=columns)
        wide = wide.sort_index()
        if not np.isfinite(wide.to_numpy(dtype=np.float64)).all():
            raise InputError(f"{place}: every seed needs the same users and finite numbers; score again")
        values = {name: wide[name].to_numpy(dtype=np.float64) for name in columns}
        for name in counts:
            if not (values[name] == values[name][:, :1]).all() or (values[name] < 1).any():
                raise InputError(f"{place}: a user's {name} is at least 1 and the same for all seeds; score again")
        one = np.ones(len(wide))
        return cls(
            metrics=tuple(metrics),
            users=tuple(wide.index),
            seeds=tuple(int(seed) for seed in sorted(frame["seed"].unique())),
            totals={metric.name: values[metric.total] for metric in metrics},
            counts={metric.name: values[metric.count][:, 0] if metric.count else one for metric in metrics},
        )


def pooled_metrics(users: UserTotals, weights_BU: Floats) -> dict[str, Floats]:
    """Return each metric, [B], of users weighted by `weights_BU` [B, U]; a mean over the seeds of sample."""
    pooled = {}
    for metric in users.metrics:
        counted_B1 = weights_BU @ users.counts[metric.name][:, None]
        value_BS = weights_BU @ users.totals[metric.name] / counted_B1
        pooled[metric.name] = (np.sqrt(value_BS) if metric.root else value_BS).mean(axis=1)
    return pooled


def resample_weights(users: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each user is drawn in each resample: blocks [b, U] whose rows each sum to U, b adding up to B."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK_ELEMENTS // users)
    for start in range(0, resamples, rows):
        b = min(rows, resamples - start)
        drawn = rng.integers(users, size=(b, users)) + np.arange(b)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=b * users).reshape(b, users).astype(np.float64)


def seed_interval(values: Sequence[float]) -> Interval:
    """Return the mean over seeds with Student's t interval (n - 1 degrees of freedom); one seed gives no interval."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise InputError(f"seed interval: needs finite values of at least one seed, got {list(values)}; train again")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stdtrit(x.size - 1, (1 + LEVEL) / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, int(x.size))


# --- samples of users ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One metric of one trained configuration in one cell."""

    seeds: Mapping[int, float]
    """Training seed -> value over all users."""
    drawn: Floats
    """[B], over resampled users, seeds averaged."""
    users: tuple[str, ...]
    """Whose rows they are."""
    fixed: bool = False
    """Of a simple baseline without training: nothing depends on a seed."""

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(list(self.seeds.values())))


def samples(
    users: UserTotals, *, fixed: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Sample]:  # fmt: skip
    """Return a sample of every metric, all from one set of resamples."""
    blocks = [pooled_metrics(users, weights) for weights in resample_weights(len(users.users), resamples, seed)]
    return {
        metric.name: Sample(
            dict(zip(users.seeds, _by_seed(users, metric), strict=True)),
            np.concatenate([block[metric.name] for block in blocks]),
            users.users,
            fixed,
        )
        for metric in users.metrics
    }


def interval_over_users(sample: Sample) -> Interval:
    """Return the value with its percentile interval over resampled users; `n` is the number of users."""
    return _percentile(sample.value, sample.drawn, len(sample.users))


def difference_over_users(ours: Sample, theirs: Sample) -> Interval:
    """Return ours minus theirs with its interval over the same resampled users in both."""
    return _percentile(ours.value - theirs.value, ours.drawn - theirs.drawn, len(ours.users))


def _by_seed(users: UserTotals, metric: Metric) -> list[float]:
    """Return one metric of each seed, over all users."""
    values = users.totals[metric.name].sum(axis=0) / users.counts[metric.name].sum()
    return [float(value) for value in (np.sqrt(values) if metric.root else values)]


def _percentile(value: float, drawn_B: Floats, n: int) -> Interval:
    if n == 1:
        return Interval(value, math.nan, math.nan, 1)
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


# --- effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Variance of one training over seeds, pooled over the trials of a cell that have several."""

    variance: float
    freedom: int


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How much better one configuration is than another (above 0: better), with what it varies by."""

    value: float
    seeds: int
    seed_variance: float
    """Of `value`, over the seeds at hand; NaN: one seed, and no trial tells how seeds vary."""
    seed_freedom: float
    users: int
    user_variance: float
    """Of `value`, over the users at hand."""
    paired: bool = True
    """Whether both have the same users."""

    @property
    def error(self) -> float:
        """Standard error of the value."""
        return math.sqrt(self.seed_variance + self.user_variance)

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom of the two variances."""
        parts = [(self.seed_variance, self.seed_freedom), (self.user_variance, self.users - 1.0)]
        below = sum(variance**2 / freedom for variance, freedom in parts if variance > 0)
        return self.error**4 / below if below > 0 else math.inf

    def interval(self) -> Interval:
        """Return the value with its 95% interval; `n` is the number of seeds."""
        half = float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error
        return Interval(self.value, self.value - half, self.value + half, self.seeds)

    def tail(self, sign: int = 1) -> float:
        """Return the one-sided p value of "better" (sign 1) or "worse" (sign -1): small where the data say so; of NaN 1."""
        if math.isnan(self.error):
            return 1.0
        if self.error == 0:
            return float(sign * self.value <= 0)
        return float(stdtr(self.freedom, -sign * self.value / self.error))

    def minus(self, other: Effect) -> Effect:
        """Return the difference of the effects of two cells.

        They share training seeds, and a cell of a higher cold ratio holds the test users of a lower one; what both effects
        have in common by that cancels here, but is counted in both variances, so that the test errs on the careful side.
        """
        return Effect(
            value=self.value - other.value, seeds=min(self.seeds, other.seeds),
            seed_variance=self.seed_variance + other.seed_variance,
            seed_freedom=min(self.seed_freedom, other.seed_freedom), users=min(self.users, other.users),
            user_variance=self.user_variance + other.user_variance, paired=False,
        )  # fmt: skip

    def at(self, seeds: int, users: int | None = None) -> Effect:
        """Return the effect as it would be known with other numbers of seeds and users."""
        users = users or self.users
        shared = self.user_variance * self.users / users
        freedom = self.seed_freedom if self.seeds == 1 else self.seed_freedom / max(1, self.seeds - 1) * (seeds - 1)
        return replace(
            self, seeds=seeds, seed_variance=self.seed_variance * self.seeds / seeds, users=users, user_variance=shared,
            seed_freedom=max(1.0, freedom),
        )  # fmt: skip


def effect(ours: Sample, theirs: Sample, *, higher: bool, spread: Spread | None = None) -> Effect:
    """Return how much better `ours` is; paired by seed and by user where both have the same ones.

    `spread` stands in for the variance over seeds where there is one seed.
    """
    sign = 1.0 if higher else -1.0
    value = sign * (ours.value - theirs.value)
    users, paired = min(len(ours.users), len(theirs.users)), ours.users == theirs.users
    drawn = [ours.drawn - theirs.drawn] if paired else [ours.drawn, theirs.drawn]
    user_variance = sum(float(np.var(values, ddof=1)) for values in drawn)
    seeds = min(len(sample.seeds) for sample in (ours, theirs) if not sample.fixed or ours.fixed == theirs.fixed)
    seed_variance, freedom = _over_seeds(ours, theirs, spread)
    return Effect(
        value=value, seeds=seeds, seed_variance=seed_variance, seed_freedom=freedom, users=users,
        user_variance=user_variance, paired=paired,
    )  # fmt: skip


def pooled_spread(trials: Sequence[Sequence[float]]) -> Spread | None:
    """Pool the values over seeds of several trials; None where no trial has two."""
    several = [values for values in trials if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    return Spread(variance=sum(float(np.var(values)) * len(values) for values in several) / freedom, freedom=freedom)


def _over_seeds(ours: Sample, theirs: Sample, spread: Spread | None) -> tuple[float, float]:
    """Return the variance of the difference over seeds, and its degrees of freedom."""
    trained = [sample for sample in (ours, theirs) if not sample.fixed]
    if not trained:
        return 0.0, 1.0
    if min(len(sample.seeds) for sample in trained) == 1:
        parts = [1.0 / len(sample.seeds) for sample in trained]
        return (spread.variance * sum(parts), float(spread.freedom)) if spread else (math.nan, 1.0)
    if len(trained) == 2 and set(ours.seeds) == set(theirs.seeds):
        differences = [ours.seeds[seed] - theirs.seeds[seed] for seed in ours.seeds]
        return float(np.var(differences, ddof=1)) / len(differences), len(differences) - 1.0
    variances = [float(np.var(list(sample.seeds.values()), ddof=1)) / len(sample.seeds) for sample in trained]
    return sum(variances), min(len(sample.seeds) for sample in trained) - 1.0


# --- many comparisons, and how many seeds they need ---------------------------------------------------------------


def in_at_least(tails: Sequence[float], least: int) -> float:
    """Return the p value of "true in at least `least` of these", from one-sided ones.

    By Benjamini and Heller (2008), in Bonferroni's form: with `least` equal to their number it is the largest of them.
    """
    return min(1.0, (len(tails) - least + 1) * sorted(tails)[least - 1])


def holm(tails: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979): at most the stated share of families has a false one."""
    corrected, before = [0.0] * len(tails), 0.0
    for rank, k in enumerate(sorted(range(len(tails)), key=lambda k: (tails[k], k))):
        before = max(before, min(1.0, (len(tails) - rank) * tails[k]))
        corrected[k] = before
    return corrected


def power(measured: Effect, difference: float, level: float) -> float:
    """Return the chance that a two-sided test at `level` sees a true `difference`, by the noncentral t distribution."""
    if math.isnan(measured.error):
        return math.nan
    if measured.error == 0:
        return 1.0
    from scipy.stats import nct  # half a second, and claims alone need it

    critical = stdtrit(measured.freedom, 1 - level / 2)
    return float(nct.sf(critical, measured.freedom, abs(difference) / measured.error))


def seeds_needed(measured: Effect, difference: float, level: float) -> int | None:
    """Return the smallest number of seeds that sees `difference` with POWER at `level`; None: not even MOST_SEEDS do."""
    return _smallest(
        lambda seeds: power(measured.at(seeds), difference, level) >= POWER, measured.seeds + 1, MOST_SEEDS
    )


def users_needed(measured: Effect, difference: float, level: float) -> tuple[int, int] | None:
    """Return the fewest (users, seeds) that see `difference`: with the seeds at hand, else with as many times more seeds.

    None: not even a thousand times as many of both do.
    """

    def seen(users: int, seeds: int) -> bool:
        return power(measured.at(seeds, users), difference, level) >= POWER

    most = 1_000 * measured.users
    users = _smallest(lambda users: seen(users, measured.seeds), measured.users, most)
    if users is not None:
        return users, measured.seeds
    users = _smallest(lambda users: seen(users, _times(measured, users)), measured.users, most)
    return None if users is None else (users, _times(measured, users))


def _times(measured: Effect, users: int) -> int:
    """Return the seeds that are as many times those at hand as `users` are."""
    return math.ceil(measured.seeds * users / measured.users)


def _smallest(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the smallest whole number that is enough, by doubling, then bisection.

    Far too many users can be too few again: the variance that is left is that over few seeds, with few degrees of freedom.
    """
    top = low
    while not enough(top):
        if top >= high:
            return None
        low, top = top + 1, min(2 * top, high)
    while low < top:
        middle = (low + top) // 2
        low, top = (low, middle) if enough(middle) else (middle + 1, top)
    return top
