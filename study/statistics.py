"""Intervals: over users by bootstrap, over seeds by Student's t, paired wherever two rows share their test users.

Legend: U test users, S seeds, B bootstrap resamples.

MAE and RMSE pool every test rating (MuSiC 4.1.2), so a resample of the users adds up their error sums and counts and
divides once; the average of the users' own RMSEs would be another number. NDCG@20 is averaged over users. All rows of
one call share their resamples, which is what makes `paired_difference` paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from features.errors import InputError

Floats = npt.NDArray[np.float64]

METRICS = ("mae", "rmse", "ndcg20")
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
    """What `per_user.csv` says: error sums per test user and seed, users sorted."""

    users: tuple[str, ...]
    ratings: Floats  # [U] test ratings per user
    absolute: Floats  # [U, S] sum of |r - r_hat|, rating points
    squared: Floats  # [U, S] sum of (r - r_hat)^2, rating points squared
    ndcg: Floats  # [U, S] NDCG@20 of the user's own test items

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, place: str = "per_user.csv") -> UserErrors:
        """Columns seed, user, n, sum_abs_error, sum_squared_error, ndcg20; every seed must hold the same users.

        Raises InputError (starting with `place`) for missing columns, repeated or missing pairs and non-finite values.
        """
        needed = ["seed", "user", "n", "sum_abs_error", "sum_squared_error", "ndcg20"]
        lacking = [name for name in needed if name not in frame.columns]
        if lacking:
            raise InputError(f"{place}: needs the columns {', '.join(needed)}, lacks {', '.join(lacking)}; score again")
        if frame.empty or frame.duplicated(["seed", "user"]).any():
            raise InputError(f"{place}: needs one row per seed and user, has {len(frame)} rows; score again")
        wide = frame.assign(user=frame["user"].astype(str)).pivot(index="user", columns="seed", values=needed[2:])
        wide = wide.sort_index()
        values = wide.to_numpy(dtype=np.float64)
        if not np.isfinite(values).all():
            raise InputError(f"{place}: every seed needs the same users and finite numbers; score again")
        n_US, abs_US, sq_US, ndcg_US = (wide[name].to_numpy(dtype=np.float64) for name in needed[2:])
        if not (n_US == n_US[:, :1]).all() or (n_US < 1).any():
            raise InputError(
                f"{place}: a user's number of ratings is at least 1 and the same for all seeds; score again"
            )
        return cls(tuple(wide.index), n_US[:, 0], abs_US, sq_US, ndcg_US)


def pooled_metrics(errors: UserErrors, weights_BU: Floats) -> dict[str, Floats]:
    """MAE, RMSE and NDCG@20, each [B], of users weighted by `weights_BU` [B, U]; a mean over the seeds of each."""
    ratings_B1 = weights_BU @ errors.ratings[:, None]
    users_B1 = weights_BU.sum(axis=1, keepdims=True)
    return {
        "mae": (weights_BU @ errors.absolute / ratings_B1).mean(axis=1),
        "rmse": np.sqrt(weights_BU @ errors.squared / ratings_B1).mean(axis=1),
        "ndcg20": (weights_BU @ errors.ndcg / users_B1).mean(axis=1),
    }


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
    return {name: _percentile(float(point[name][0]), drawn[name], len(errors.users)) for name in METRICS}


def paired_difference(
    errors: UserErrors, baseline: UserErrors, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Each metric minus the baseline's, with its interval over the same resampled users in both.

    Raises InputError where the two were not evaluated on the same ratings of the same users.
    """
    if errors.users != baseline.users or not np.array_equal(errors.ratings, baseline.ratings):
        raise InputError(
            f"paired difference: both rows need the same test users and ratings, got {len(errors.users)} and"
            f" {len(baseline.users)} users; score both on the same task"
        )
    ours, theirs = _resampled(errors, resamples, seed), _resampled(baseline, resamples, seed)
    ones = np.ones((1, len(errors.users)))
    point, base = pooled_metrics(errors, ones), pooled_metrics(baseline, ones)
    return {
        name: _percentile(float(point[name][0] - base[name][0]), ours[name] - theirs[name], len(errors.users))
        for name in METRICS
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
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}


def _percentile(value: float, drawn_B: Floats, n: int) -> Interval:
    if n == 1:
        return Interval(value, math.nan, math.nan, 1)
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)
