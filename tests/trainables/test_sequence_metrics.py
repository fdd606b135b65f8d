"""Next-item metrics: by hand, ties included, and against orders drawn at random."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainables.metrics.sequential import SequenceErrors, hit_rate, ndcg, sequence_errors, target_ranks
from trainables.tasks.sequential import HeldOut, Sequences


def ranks(scores: list[list[float]], target: list[int] | None = None) -> tuple[list[int], list[int]]:
    above, tied = target_ranks(torch.tensor(scores), torch.tensor(target or [0] * len(scores)))
    return above.tolist(), tied.tolist()


def held_out(target: list[int], protocol: list[int], user: list[int], candidates: Tensor) -> HeldOut:
    empty = Sequences(torch.zeros(0, dtype=torch.int64), torch.zeros(len(target) + 1, dtype=torch.int64))
    return HeldOut(
        history=empty, protocol=torch.tensor(protocol), user=torch.tensor(user), target=torch.tensor(target),
        candidates=candidates.int(),
    )  # fmt: skip


def test_ranks_count_what_is_above_and_what_is_equal() -> None:
    assert ranks([[0.5, 0.9, 0.5, 0.1], [3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]) == ([1, 0, 0], [1, 0, 3])
    assert ranks([[0.5, 0.9, 0.5, 0.1]], [1]) == ([0], [0])
    assert ranks([[-math.inf, -math.inf, 1.0]]) == ([1], [1])  # never shown is a rank like any other


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_a_score_that_is_no_number_is_never_a_good_rank(bad: float, place: int) -> None:
    scores = torch.zeros(2, 4)
    scores[1, place] = bad
    with pytest.raises(FloatingPointError, match="1 of 8 scores are NaN or infinity: the model has diverged"):
        target_ranks(scores, torch.zeros(2, dtype=torch.int64))


def test_metrics_by_hand() -> None:
    above, tied = np.array([0, 4, 5, 9, 10]), np.zeros(5, np.int64)
    assert hit_rate(above, tied, 5).tolist() == [1, 1, 0, 0, 0]
    assert hit_rate(above, tied, 10).tolist() == [1, 1, 1, 1, 0]
    ranked = [1 / math.log2(place + 2) for place in above]
    assert ndcg(above, tied, 5) == pytest.approx([*ranked[:2], 0, 0, 0])
    assert ndcg(above, tied, 10) == pytest.approx([*ranked[:4], 0])


def test_ties_by_hand() -> None:
    """The target shares places 4 to 7 (counted from 1) with three others: two of the four are among the first five."""
    above, tied = np.array([3]), np.array([3])
    assert hit_rate(above, tied, 5) == pytest.approx([0.5])
    assert ndcg(above, tied, 5) == pytest.approx([(1 / math.log2(5) + 1 / math.log2(6)) / 4])
    assert hit_rate(above, tied, 10) == pytest.approx([1.0])
    assert ndcg(above, tied, 10) == pytest.approx([sum(1 / math.log2(place + 1) for place in (4, 5, 6, 7)) / 4])


@pytest.mark.parametrize("at", [5, 10])
def test_a_constant_scorer_gets_what_chance_gets(at: int) -> None:
    above, tied = target_ranks(torch.full((3, 1000), 0.25), torch.tensor([0, 1, 999]))
    assert hit_rate(above, tied, at) == pytest.approx([at / 1000] * 3)
    assert ndcg(above, tied, at) == pytest.approx([sum(1 / math.log2(place + 2) for place in range(at)) / 1000] * 3)


@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=9),
    st.integers(0, 8),
    st.sampled_from([1, 2, 5, 10]),
    st.booleans(),
)
def test_metrics_are_the_mean_over_all_orders_of_ties(scores: list[int], target: int, at: int, gain: bool) -> None:
    target %= len(scores)
    above, tied = target_ranks(torch.tensor([scores]).float(), torch.tensor([target]))
    places = [sum(s > scores[target] for s in scores) + k for k in range(sum(s == scores[target] for s in scores))]
    values = [(1 / math.log2(place + 2) if gain else 1.0) * (place < at) for place in places]
    assert (ndcg if gain else hit_rate)(above, tied, at) == pytest.approx([sum(values) / len(places)])


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10), st.floats(-5, 5))
def test_only_the_order_counts_and_a_higher_target_is_never_worse(seed: int, scale: float, shift: float) -> None:
    scores = torch.randint(0, 6, (4, 12), generator=torch.Generator().manual_seed(seed)).double()
    first = torch.zeros(4, dtype=torch.int64)
    before = target_ranks(scores, first)
    for left, right in zip(before, target_ranks(scores * scale + shift, first), strict=True):
        np.testing.assert_array_equal(left, right)
    scores[:, 0] += 1
    after = target_ranks(scores, first)
    assert (ndcg(*after, 5) >= ndcg(*before, 5) - 1e-12).all()
    assert (hit_rate(*after, 5) >= hit_rate(*before, 5) - 1e-12).all()


def test_means_are_taken_over_users_then_over_protocols() -> None:
    values = np.array([1.0, 0.0, 0.5, 0.25, 0.75, 0.0])
    errors = SequenceErrors(
        user=np.array([0, 1, 2, 0, 1, 2]), protocol=np.array([0, 0, 0, 1, 1, 1]), hr5=values, hr10=values + 1,
        ndcg5=values / 2, ndcg10=1 - values,
    )  # fmt: skip
    found = errors.metrics(["as-given", "inter"])
    assert found["hr5_as-given"] == pytest.approx(0.5)
    assert found["hr5_inter"] == pytest.approx(1 / 3)
    assert found["hr5"] == pytest.approx((0.5 + 1 / 3) / 2)
    assert found["ndcg10"] == pytest.approx(1 - (0.5 + 1 / 3) / 2)
    assert set(found) == {
        f"{name}{of}" for name in ("hr5", "hr10", "ndcg5", "ndcg10") for of in ("", "_as-given", "_inter")
    }
    assert errors.columns().keys() == {"hr5", "hr10", "ndcg5", "ndcg10"}


def test_full_ranking_is_over_all_items_of_the_target_domain() -> None:
    """Items 10..29 are the target domain; the target is item 12, and seven items of it score higher."""
    full = torch.zeros(2, 20)
    full[:, 2] = 1.0
    full[:, 5:12] = 2.0
    rows = held_out([12, 12], [0, 1], [0, 0], torch.tensor([[12, 15, 28], [12, 15, 28]]))
    scores = full.gather(1, rows.candidates.long() - 10)
    found = sequence_errors(rows, scores, full, first=10)
    assert found.ndcg5.tolist() == pytest.approx([1 / math.log2(3)] * 2)
    assert found.full_hr5 is not None
    assert found.full_hr5.tolist() == [0, 0]
    assert found.full_ndcg10 is not None
    assert found.full_ndcg10.tolist() == pytest.approx([1 / math.log2(9)] * 2)
    assert found.metrics(["a", "b"])["full_hr10_b"] == 1.0
