"""Intervals: over users by bootstrap, over seeds by Student's t, paired wherever two rows share their test users.

Legend: U test users, S seeds, B bootstrap resamples.

MAE and RMSE pool every test rating (MuSiC 4.1.2), so a resample of the users adds up their error sums and counts and
divides once; the average of the users' own RMSEs would be another number. HR and NDCG are averaged over users. All rows
of one call share their resamples, which is what makes `paired_difference` paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from features.errors import InputError
from trainables.kinds import Metric

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2_000
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
class UserErrors:
    """What `per_user.csv` says of one group of rows: what each test user adds to each metric, users sorted."""

    metrics: tuple[Metric, ...]
    users: tuple[str, ...]
    totals: Mapping[str, Floats]  # metric -> [U, S]
    counts: Mapping[str, Floats]  # metric -> [U], the same for all seeds

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.totals[self.metrics[0].name][0])

    @property
    def size(self) -> int:
        """Ratings or other test cases of all users."""
        return int(self.counts[self.metrics[0].name].sum())

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, metrics: Sequence[Metric], place: str = "per_user.csv") -> UserErrors:
        """Columns seed, user and those of the metrics; every seed must hold the same users.

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
            totals={metric.name: values[metric.total] for metric in metrics},
            counts={metric.name: values[metric.count][:, 0] if metric.count else one for metric in metrics},
        )


def pooled_metrics(errors: UserErrors, weights_BU: Floats) -> dict[str, Floats]:
    """Each metric, [B], of users weighted by `weights_BU` [B, U]; a mean over the seeds of each."""
    pooled = {}
    for metric in errors.metrics:
        counted_B1 = weights_BU @ errors.counts[metric.name][:, None]
        value_BS = weights_BU @ errors.totals[metric.name] / counted_B1
        pooled[metric.name] = (np.sqrt(value_BS) if metric.root else value_BS).mean(axis=1)
    return pooled


def resample_weights(users: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each user is drawn in each resample: blocks [b, U] whose rows each sum to U, b adding up to B."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK_ELEMENTS // users)
    for start in range(0, resamples, rows):
        b = min(rows, resamples - start)
        drawn = rng.integers(users, size=(b, users)) + np.arange(b)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=b * users).reshape(b, users).astype(np.float64)


def bootstrap(errors: UserErrors, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Each metric with its percentile interval over resampled users; `n` is the number of users."""
    drawn = _resampled(errors, resamples, seed)
    point = pooled_metrics(errors, np.ones((1, len(errors.users))))
    return {name: _percentile(float(point[name][0]), drawn[name], len(errors.users)) for name in point}


def paired_difference(
    errors: UserErrors, baseline: UserErrors, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Each metric minus the baseline's, with its interval over the same resampled users in both.

    Raises InputError where the two were not evaluated on the same cases of the same users.
    """
    counts = all(np.array_equal(errors.counts[name], baseline.counts[name]) for name in errors.counts)
    if errors.users != baseline.users or not counts:
        raise InputError(
            f"paired difference: both rows need the same test users and counts, got {len(errors.users)} and"
            f" {len(baseline.users)} users; score both on the same task"
        )
    ours, theirs = _resampled(errors, resamples, seed), _resampled(baseline, resamples, seed)
    ones = np.ones((1, len(errors.users)))
    point, base = pooled_metrics(errors, ones), pooled_metrics(baseline, ones)
    return {
        name: _percentile(float(point[name][0] - base[name][0]), ours[name] - theirs[name], len(errors.users))
        for name in point
    }


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval (n - 1 degrees of freedom); one seed gives no interval."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise InputError(f"seed interval: needs finite values of at least one seed, got {list(values)}; train again")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, x.size - 1) * stats.sem(x))
    return Interval(mean, mean - half, mean + half, int(x.size))


def _resampled(errors: UserErrors, resamples: int, seed: int) -> dict[str, Floats]:
    blocks = [pooled_metrics(errors, weights) for weights in resample_weights(len(errors.users), resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _percentile(value: float, drawn_B: Floats, n: int) -> Interval:
    if n == 1:
        return Interval(value, math.nan, math.nan, 1)
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)
