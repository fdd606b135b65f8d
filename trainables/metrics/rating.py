"""Metrics of rating prediction: MAE, RMSE, NDCG@k. Shapes: N ratings, U users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NDCG_AT = 20  # MuSiC section 4.1.2


@dataclass(frozen=True, kw_only=True)
class UserErrors:
    """What each user contributes to every metric: enough to pool, to resample and to pair."""

    user: NDArray[np.int64]  # [U] user numbers, ascending; users without ratings are absent
    n: NDArray[np.int64]  # [U] ratings
    sum_abs_error: NDArray[np.float64]  # [U] rating points
    sum_squared_error: NDArray[np.float64]  # [U] rating points squared
    ndcg: NDArray[np.float64]  # [U] NDCG@20

    def metrics(self) -> dict[str, float]:
        """`mae` and `rmse` over all ratings, in rating points; `ndcg20` as the mean over users."""
        total = self.n.sum()
        return {
            "mae": float(self.sum_abs_error.sum() / total),
            "rmse": float(np.sqrt(self.sum_squared_error.sum() / total)),
            "ndcg20": float(self.ndcg.mean()),
        }


def user_errors(
    user_N: NDArray[np.int64],
    predicted_N: NDArray[np.float32],
    rating_N: NDArray[np.float32],
    bounds: tuple[float, float],
) -> UserErrors:
    """Errors per user over their ratings, and NDCG@20 of those items ranked by predicted rating, gain = rating.

    Errors are of the prediction cut to the bounds (the rating scale); the ranking is by the prediction as it is, for a cut
    ties items.
    """
    error = np.clip(predicted_N.astype(np.float64), *bounds) - rating_N
    users, code = np.unique(user_N, return_inverse=True)
    return UserErrors(
        user=users.astype(np.int64),
        n=np.bincount(code),
        sum_abs_error=_summed(code, np.abs(error)),
        sum_squared_error=_summed(code, error * error),
        ndcg=ndcg(code, predicted_N, rating_N, NDCG_AT),
    )


def ndcg(
    code_N: NDArray[np.int64], score_N: NDArray[np.float32], gain_N: NDArray[np.float32], at: int
) -> NDArray[np.float64]:
    """NDCG@`at` of every user, [U]; `code_N` numbers the users 0..U-1, each with at least one item.

    Items of equal score share the mean gain of their ranks, so a constant score gets the value expected by chance. A user
    whose gains are all 0 has 1: no order is better than another.
    """
    ideal = _dcg(code_N, gain_N.astype(np.float64), gain_N, at)
    reached = _dcg(code_N, score_N.astype(np.float64), gain_N, at)
    return np.divide(reached, ideal, out=np.ones_like(ideal), where=ideal > 0)


def _dcg(
    code_N: NDArray[np.int64], score_N: NDArray[np.float64], gain_N: NDArray[np.float32], at: int
) -> NDArray[np.float64]:
    """DCG@`at` per user with discount 1/log2(rank + 1), ties shared (McSherry & Najork 2008)."""
    order = np.lexsort((-score_N, code_N))
    code, score, gain = code_N[order], score_N[order], gain_N[order].astype(np.float64)
    counts = np.bincount(code)
    rank = np.arange(len(code)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.ones(len(code), dtype=bool)
    first[1:] = (code[1:] != code[:-1]) | (score[1:] != score[:-1])
    tie = np.cumsum(first) - 1
    shared_gain = (_summed(tie, gain) / np.bincount(tie))[tie]
    discount = np.where(rank < at, 1 / np.log2(rank + 2.0), 0.0)
    return _summed(code, shared_gain * discount)


def _summed(code_N: NDArray[np.int64], value_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum per code."""
    return np.bincount(code_N, value_N).astype(np.float64)
