"""Positive ratings, drawn negatives and averages along the graph of the source domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from trainables.source_graph import Positives, Unrated, averages, positives
from trainables.tasks.rating import Ratings, Task

from .worlds import random_task

ONES = torch.ones


def graph(rows: list[tuple[int, int]], users: int, items: int) -> Positives:
    user, item = (torch.tensor(column, dtype=torch.int64) for column in zip(*rows, strict=True))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(user, minlength=users).cumsum(0)])
    return Positives(user=user, item=item, starts=starts, items=items)


def test_hops_on_a_small_graph_by_hand() -> None:
    """u0 likes i0 and i1, u1 likes i1, u2 likes nothing; i2 is liked by nobody."""
    liked = graph([(0, 0), (0, 1), (1, 1)], 3, 3)
    z, q = torch.tensor([[1.0], [3.0], [100.0]]).double(), torch.tensor([[10.0], [20.0], [1000.0]]).double()
    one, two, three = averages(liked, z, q, 3)
    assert one.flatten().tolist() == [15.0, 20.0, 0.0]
    # A' z: i0 1, i1 2
    assert two.flatten().tolist() == [1.5, 2.0, 0.0]
    # A' A q: i0 15, i1 17.5
    assert three.flatten().tolist() == [16.25, 17.5, 0.0]
    assert averages(liked, z, q, 0) == []


def rated(task: Task, rows: list[tuple[int, int, float]]) -> Task:
    user, item, rating = zip(*rows, strict=True)
    ratings = Ratings(torch.tensor(user), torch.tensor(item), torch.tensor(rating))
    return replace(task, source_ratings=ratings, source_items=4)


def test_positives_are_above_the_middle_of_the_scale_in_the_order_of_time() -> None:
    rows = [(0, 3, 5.0), (0, 1, 3.0), (0, 0, 4.0), (1, 2, 1.0), (2, 2, 4.0), (2, 1, 5.0)]
    liked = positives(replace(rated(random_task(), rows), source_times=True), 0)
    assert list(zip(liked.user.tolist(), liked.item.tolist(), strict=True)) == [(0, 3), (0, 0), (2, 2), (2, 1)]
    assert liked.starts.tolist() == [0, 2, 2, 4]


def test_the_middle_is_that_of_the_source_domains_scale() -> None:
    task = replace(rated(random_task(), [(0, 3, 5.0), (0, 1, 6.0)]), source_scale=(1.0, 10.0), rating_scale=(1.0, 5.0))
    assert positives(task, 0).item.tolist() == [1]


def test_without_times_the_order_is_drawn_from_the_seed_within_each_user() -> None:
    task = random_task(each=12)
    one, again, other = (positives(task, seed) for seed in (0, 0, 1))
    assert torch.equal(one.item, again.item)
    assert not torch.equal(one.item, other.item)
    assert torch.equal(one.user, other.user)
    ordered = positives(replace(task, source_times=True), 0)
    for first, last in zip(one.starts.tolist(), one.starts.tolist()[1:], strict=False):
        assert one.item[first:last].sort().values.tolist() == ordered.item[first:last].sort().values.tolist()


def test_histories_are_the_latest_items_and_their_padding_is_marked() -> None:
    liked = graph([(0, 3), (0, 1), (0, 2), (2, 3)], 3, 4)
    item, real = liked.histories(torch.tensor([2, 0, 1]), 2)
    assert item.tolist() == [[3, 0], [1, 2], [0, 0]]
    assert real.tolist() == [[True, False], [True, True], [False, False]]
    assert liked.histories(torch.tensor([0]), 0)[0].tolist() == [[3, 1, 2]]
    assert liked.histories(torch.tensor([1]), 5)[1].tolist() == [[False]]


def test_no_drawn_item_is_among_those_that_the_user_has_rated() -> None:
    task = random_task(each=15)  # 15 of 20 items: three of four draws collide
    unrated, users = Unrated(task, 12), torch.arange(12).repeat(850)
    drawn = unrated.draw(users, torch.Generator().manual_seed(0))
    known = {(u, i) for u, i in zip(task.source_ratings.user.tolist(), task.source_ratings.item.tolist(), strict=True)}
    assert len(drawn) > 10_000
    assert not known & set(zip(users.tolist(), drawn.tolist(), strict=True))
    counts = np.bincount(drawn[users == 0].numpy())
    counts = counts[counts > 0]
    assert len(counts) == 5  # evenly over what is left
    assert counts.min() > 130
    assert counts.max() < 210


def test_who_has_rated_all_items_is_not_asked_for() -> None:
    rows = [(0, item, 5.0) for item in range(4)] + [(1, 0, 5.0)]
    assert Unrated(rated(random_task(), rows), 2).askable.tolist() == [False, True]
