"""Intervals and tests: over users by bootstrap, over seeds by Student's t, paired wherever two rows share their users.

Legend: U test users, S seeds, B bootstrap resamples.

MAE and RMSE pool every test rating (MuSiC 4.1.2), so a resample of the users adds up their error sums and counts and
divides once; the average of the users' own RMSEs would be another number. HR and NDCG are averaged over users. All samples
of the same number of users share their resamples, which is what pairs their differences.

A comparison is tested on an `Effect`: a weighted sum of configurations with what it varies by. Users and training seeds
are crossed, so its variance is V_users + V_seeds - V_both, with V_both the mean square of what neither explains alone
(two-way clustering: Cameron, Gelbach and Miller 2011), and never less than the larger of the first two; its test is a t
test with Satterthwaite's degrees of freedom. RMSE is linearised: a user's pseudo-value is what the user adds to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import chdtrc, ndtri, stdtr, stdtrit

from features.errors import InputError
from trainables.task_types import Metric

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2_000
POWER = 0.8  # with which a difference should be seen by the seeds that are asked for
MOST_SEEDS = 1_000  # more are not asked for
_NONE = 1e-12  # what rounding leaves of two equal numbers
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

    table: Floats
    """[U, S] pseudo-values: the mean over the users is the value of the seed."""
    seeds: tuple[int, ...]
    users: tuple[str, ...]
    """Whose rows they are."""
    drawn: Floats = field(default_factory=lambda: np.empty(0))
    """[B], over resampled users, seeds averaged; empty where nothing was drawn."""
    fixed: bool = False
    """Of a simple baseline without training: nothing depends on a seed."""

    @property
    def by_seed(self) -> Floats:
        """[S], over all users."""
        return np.asarray(self.table.mean(axis=0))

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return float(self.table.mean())


def samples(
    users: UserTotals, *, fixed: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Sample]:  # fmt: skip
    """Return a sample of every metric, all from one set of resamples (0: none are drawn)."""
    blocks = [pooled_metrics(users, weights) for weights in resample_weights(len(users.users), resamples, seed)]
    return {
        metric.name: Sample(
            _pseudo_values(users, metric), users.seeds, users.users,
            np.concatenate([block[metric.name] for block in blocks]) if blocks else np.empty(0), fixed,
        )
        for metric in users.metrics
    }  # fmt: skip


def interval_over_users(sample: Sample) -> Interval:
    """Return the value with its percentile interval over resampled users; `n` is the number of users."""
    return _percentile(sample.value, sample.drawn, len(sample.users))


def difference_over_users(ours: Sample, theirs: Sample) -> Interval:
    """Return ours minus theirs with its interval over the same resampled users in both."""
    return _percentile(ours.value - theirs.value, ours.drawn - theirs.drawn, len(ours.users))


def _pseudo_values(users: UserTotals, metric: Metric) -> Floats:
    """Return [U, S]: the metric of a seed plus U times the user's influence on it (of a root by the delta method)."""
    total_US, count_U1 = users.totals[metric.name], users.counts[metric.name][:, None]
    mean_S = total_US.sum(axis=0) / count_U1.sum()
    influence_US = (total_US - mean_S * count_U1) * len(count_U1) / count_U1.sum()
    if not metric.root:
        return np.asarray(mean_S + influence_US)
    root_S = np.sqrt(mean_S)
    return np.asarray(root_S + influence_US / np.where(root_S > 0, 2 * root_S, 1.0))


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
    both_variance: float = 0.0
    """What the two hold in common: of what neither users nor seeds explain alone."""
    paired: bool = True
    """Whether all configurations have the same users."""

    @property
    def error(self) -> float:
        """Standard error of the value."""
        if math.isnan(self.seed_variance):
            return math.nan
        crossed = self.user_variance + self.seed_variance - self.both_variance
        return math.sqrt(max(self.user_variance, self.seed_variance, crossed))

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom of the variances."""
        users = max(1.0, self.users - 1.0)
        parts = [
            (self.seed_variance, self.seed_freedom), (self.user_variance, users),
            (self.both_variance, users * self.seed_freedom),
        ]  # fmt: skip
        below = sum(variance**2 / freedom for variance, freedom in parts if variance > 0)
        return self.error**4 / below if below > 0 else math.inf

    def interval(self) -> Interval:
        """Return the value with its 95% interval; `n` is the number of seeds."""
        half = float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error
        return Interval(self.value, self.value - half, self.value + half, self.seeds)

    def lower_end(self) -> float:
        """Return the lower end of the one-sided 95% interval."""
        return self.value - float(stdtrit(self.freedom, LEVEL)) * self.error

    def tail(self, sign: int = 1, margin: float = 0.0) -> float:
        """Return the one-sided p value of "more than `margin`" (sign 1) or "less" (sign -1): small where the data say so.

        Where nothing tells how seeds vary it is 1.
        """
        distance = sign * (self.value - margin)
        if math.isnan(self.error):
            return 1.0
        if self.error < _NONE:
            return float(distance < _NONE)
        return float(stdtr(self.freedom, -distance / self.error))

    def at(self, seeds: int, users: int | None = None) -> Effect:
        """Return the effect as it would be known with other numbers of seeds and users."""
        users = users or self.users
        freedom = self.seed_freedom if self.seeds == 1 else self.seed_freedom / max(1, self.seeds - 1) * (seeds - 1)
        by_seeds, by_users = self.seeds / seeds, self.users / users
        seed_alone = max(0.0, self.seed_variance - self.both_variance) * by_seeds
        user_alone = max(0.0, self.user_variance - self.both_variance) * by_users
        both = min(self.both_variance, self.seed_variance, self.user_variance) * by_seeds * by_users
        return replace(
            self, seeds=seeds, seed_variance=seed_alone + both, users=users, user_variance=user_alone + both,
            both_variance=both, seed_freedom=max(1.0, freedom),
        )  # fmt: skip


def effect(ours: Sample, theirs: Sample, *, higher: bool, spread: Spread | None = None) -> Effect:
    """Return how much better `ours` is; paired by seed and by user where both have the same ones.

    `spread` stands in for the variance over seeds where there is one seed.
    """
    sign = 1.0 if higher else -1.0
    return combine([(sign, ours), (-sign, theirs)], spread)


def combine(terms: Sequence[tuple[float, Sample]], spread: Spread | None = None) -> Effect:
    """Return a weighted sum of configurations of one cell, e.g. one less the mean of others."""
    samples_, trained = [sample for _, sample in terms], [(w, sample) for w, sample in terms if not sample.fixed]
    paired = all(sample.users == samples_[0].users for sample in samples_)
    means_KU = [weight * sample.table.mean(axis=1) for weight, sample in terms]
    by_user = [np.sum(means_KU, axis=0)] if paired else means_KU
    seed_variance, freedom = _over_seeds(trained, spread)
    crossed = paired and len({sample.seeds for _, sample in trained}) == 1
    return Effect(
        value=sum(weight * sample.value for weight, sample in terms),
        seeds=min(len(sample.seeds) for sample in ([sample for _, sample in trained] or samples_)),
        seed_variance=seed_variance, seed_freedom=freedom, users=min(len(sample.users) for sample in samples_),
        user_variance=sum(_mean_square(values_U) for values_U in by_user),
        both_variance=_interaction(np.sum([w * sample.table for w, sample in trained], axis=0)) if crossed else 0.0,
        paired=paired,
    )  # fmt: skip


def pool(weighted: Sequence[tuple[float, Effect]], tasks: Sequence[str]) -> Effect:
    """Return a weighted sum of the effects of several cells, each of one of `tasks`.

    Trainings of different cells see different data, so their seeds are independent. Cells of one task share users: those of
    the smaller cell are among those of the larger one, and would at most repeat there what they add here. Of a difference
    that would cancel, and is left out, so that the test errs on the careful side both times.
    """
    weights = [weight for weight, _ in weighted]
    effects = [effect for _, effect in weighted]
    users = sum(weight**2 * effect.user_variance for weight, effect in weighted)
    for j, k in itertools.combinations(range(len(effects)), 2):
        if tasks[j] == tasks[k] and weights[j] * weights[k] > 0:
            one, two = effects[j], effects[k]
            shared = math.sqrt(min(one.users, two.users) / max(one.users, two.users))
            users += 2 * weights[j] * weights[k] * shared * math.sqrt(one.user_variance * two.user_variance)
    seeds = [weight**2 * effect.seed_variance for weight, effect in weighted]
    below = sum(part**2 / effect.seed_freedom for part, effect in zip(seeds, effects, strict=True))
    return Effect(
        value=sum(weight * effect.value for weight, effect in weighted), seeds=min(e.seeds for e in effects),
        seed_variance=sum(seeds), users=sum(effect.users for effect in effects), user_variance=users,
        seed_freedom=sum(seeds) ** 2 / below if below > 0 else min(effect.seed_freedom for effect in effects),
        both_variance=sum(weight**2 * effect.both_variance for weight, effect in weighted),
        paired=all(effect.paired for effect in effects),
    )  # fmt: skip


def opposite_signs(effects: Sequence[Effect]) -> float:
    """Return the p value of "some cells go one way and some the other" (Gail and Simon 1985, likelihood ratio).

    Their cells are independent; ours of one task share users, so it errs on the careful side there. 1 where one cell or
    one sign is all there is.
    """
    squares = [(effect.value, (effect.value / effect.error) ** 2) for effect in effects if effect.error > 0]
    ratio = min(sum(q for value, q in squares if value > 0), sum(q for value, q in squares if value < 0))
    others = len(squares) - 1
    if others < 1 or ratio == 0:
        return 1.0
    return float(sum(math.comb(others, h) / 2**others * chdtrc(h, ratio) for h in range(1, others + 1)))


def pooled_spread(trials: Sequence[Sequence[float]]) -> Spread | None:
    """Pool the values over seeds of several trials; None where no trial has two."""
    several = [values for values in trials if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    return Spread(variance=sum(float(np.var(values)) * len(values) for values in several) / freedom, freedom=freedom)


def _over_seeds(trained: Sequence[tuple[float, Sample]], spread: Spread | None) -> tuple[float, float]:
    """Return the variance of a weighted sum over seeds, and its degrees of freedom."""
    if not trained:
        return 0.0, 1.0
    if min(len(sample.seeds) for _, sample in trained) == 1:
        parts = [weight**2 / len(sample.seeds) for weight, sample in trained]
        return (spread.variance * sum(parts), float(spread.freedom)) if spread else (math.nan, 1.0)
    means_KS = [weight * sample.by_seed for weight, sample in trained]
    if len({sample.seeds for _, sample in trained}) == 1:
        return _mean_square(np.sum(means_KS, axis=0)), len(means_KS[0]) - 1.0
    return sum(map(_mean_square, means_KS)), min(len(mean_S) for mean_S in means_KS) - 1.0


def _mean_square(values: Floats) -> float:
    """Return the variance of the mean of some values; 0 of a single one."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _interaction(table_US: Floats) -> float:
    """Return the variance of the table's mean by what rows and columns leave unexplained."""
    users, seeds = table_US.shape
    if min(users, seeds) == 1:
        return 0.0
    rest_US = table_US - table_US.mean(axis=1, keepdims=True) - table_US.mean(axis=0) + table_US.mean()
    return float(np.square(rest_US).sum() / ((users - 1) * (seeds - 1) * users * seeds))


# --- many comparisons, and how many seeds they need ---------------------------------------------------------------


def holm(tails: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979): at most the stated share of families has a false one."""
    corrected, before = [0.0] * len(tails), 0.0
    for rank, k in enumerate(sorted(range(len(tails)), key=lambda k: (tails[k], k))):
        before = max(before, min(1.0, (len(tails) - rank) * tails[k]))
        corrected[k] = before
    return corrected


def power(measured: Effect, difference: float, level: float) -> float:
    """Return the chance that a one-sided test at `level` sees a true `difference`, by the noncentral t distribution."""
    if math.isnan(measured.error):
        return math.nan
    if measured.error == 0:
        return 1.0
    from scipy.stats import nct  # half a second, and claims alone need it

    critical = stdtrit(measured.freedom, 1 - level)
    return float(nct.sf(critical, measured.freedom, abs(difference) / measured.error))


def small_telescopes(measured: Effect, users: float) -> float:
    """Return the effect that a study of so many users would have seen with a power of a third (Simonsohn 2015).

    Two-sided at 5%, with users as different as those measured; the seeds of its trainings are left out.
    """
    error = math.sqrt(measured.user_variance * measured.users / users)
    return float((ndtri(0.975) - ndtri(2 / 3)) * error)


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
