"""MAE, RMSE and NDCG@20 against loops, by hand and over all orders of tied items."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest

from trainables.metrics.rating import ndcg, user_errors


def dcg(gains: list[float], at: int) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:at], start=1))


def reference_ndcg(scores: list[float], gains: list[float], at: int) -> float:
    """Mean over every order of the items that their scores allow."""
    orders = [
        order for order in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    ideal = dcg(sorted(gains, reverse=True), at)
    return sum(dcg([gains[i] for i in order], at) for order in orders) / len(orders) / ideal


def one_user(scores: list[float], gains: list[float], at: int = 20) -> float:
    codes = np.zeros(len(scores), np.int64)
    return float(ndcg(codes, np.array(scores, np.float32), np.array(gains, np.float32), at)[0])


def test_ndcg_by_hand() -> None:
    # Ranked 5, 1, 3 where 5, 3, 1 is best: (5 + 1/log2(3) + 3/2) / (5 + 3/log2(3) + 1/2)
    assert one_user([0.9, 0.5, 0.7], [5, 3, 1]) == pytest.approx((5 + 0.63093 + 1.5) / (5 + 1.89279 + 0.5), abs=1e-5)
    assert one_user([3, 2, 1], [5, 3, 1]) == 1.0
    assert one_user([0.1], [4]) == 1.0


@pytest.mark.parametrize("at", [1, 2, 3, 20])
def test_ndcg_with_ties_is_the_mean_over_the_orders_they_allow(at: int) -> None:
    draw = np.random.default_rng(at)
    for _ in range(40):
        size = int(draw.integers(1, 7))
        scores, gains = draw.integers(1, 4, size).tolist(), draw.integers(1, 6, size).tolist()
        assert one_user(scores, gains, at) == pytest.approx(reference_ndcg(scores, gains, at), rel=1e-6)


def test_a_constant_score_gets_what_chance_gives_and_not_the_order_of_the_rows() -> None:
    best_first, worst_first = one_user([1, 1, 1, 1], [5, 4, 2, 1]), one_user([1, 1, 1, 1], [1, 2, 4, 5])
    assert best_first == worst_first == pytest.approx(reference_ndcg([1] * 4, [5, 4, 2, 1], 20))
    assert best_first < 1


def test_ndcg_stops_at_twenty() -> None:
    scores, gains = list(range(30, 0, -1)), [1.0] * 20 + [5.0] * 10  # the best ten are ranked last
    expected = dcg([1.0] * 20, 20) / dcg([5.0] * 10 + [1.0] * 10, 20)
    assert one_user([float(score) for score in scores], gains) == pytest.approx(expected)


def test_every_users_errors_against_a_loop() -> None:
    draw = np.random.default_rng(0)
    user = np.sort(draw.choice([3, 4, 9, 11], 60))
    predicted = (np.round(draw.normal(3.5, 1, 60), 1)).astype(np.float32)
    rating = draw.integers(1, 6, 60).astype(np.float32)
    errors = user_errors(user, predicted, rating, (1.0, 5.0))
    assert errors.user.tolist() == sorted(set(user.tolist()))
    for place, name in enumerate(errors.user):
        rows = np.flatnonzero(user == name)
        left = [min(5.0, max(1.0, float(predicted[i]))) - float(rating[i]) for i in rows]
        assert errors.n[place] == len(rows)
        assert errors.sum_abs_error[place] == pytest.approx(sum(abs(e) for e in left))
        assert errors.sum_squared_error[place] == pytest.approx(sum(e * e for e in left))
        assert errors.ndcg[place] == pytest.approx(one_user(predicted[rows].tolist(), rating[rows].tolist()))
    pooled = [min(5.0, max(1.0, float(p))) - float(r) for p, r in zip(predicted, rating, strict=True)]
    metrics = errors.metrics()
    assert metrics["mae"] == pytest.approx(sum(abs(e) for e in pooled) / 60)
    assert metrics["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in pooled) / 60))
    assert metrics["ndcg20"] == pytest.approx(float(np.mean(errors.ndcg)))


def test_the_order_of_the_rows_changes_nothing() -> None:
    draw = np.random.default_rng(1)
    user, predicted, rating = draw.integers(0, 5, 80), draw.integers(1, 4, 80), draw.integers(1, 6, 80)
    shuffled = draw.permutation(80)
    first = user_errors(user, predicted.astype(np.float32), rating.astype(np.float32), (1.0, 5.0))
    again = user_errors(
        user[shuffled], predicted[shuffled].astype(np.float32), rating[shuffled].astype(np.float32), (1.0, 5.0)
    )
    np.testing.assert_allclose(first.ndcg, again.ndcg, rtol=1e-12)
    assert first.metrics() == pytest.approx(again.metrics())
