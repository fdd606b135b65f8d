"""Base vectors: equal to the task's own, to a slow solution, and fitted to what the offsets leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.base_factors import (
    OFFSETS,
    BaseVectors,
    Offsets,
    base_vectors,
    fitted_offsets,
    source_interactions,
    target_interactions,
    target_offsets,
)
from trainables.baselines.rating import PREDICTORS
from trainables.tasks.arrays import FeatureRows
from trainables.tasks.rating import SHRINKAGE, load_task

from .slow_base import slow_base, slow_biases
from .worlds import FACTORS, World, build, random_task


def raw(rows: FeatureRows) -> torch.Tensor:
    """Vectors as they were before they were centred and scaled, [N, F]."""
    return rows.all() * rows.scale + rows.centre


def test_with_item_means_and_the_numbers_of_the_task_they_are_its_own_vectors(world: World, tmp_path: Path) -> None:
    task = load_task(build(world, tmp_path, "ratings").task_dir)
    base = base_vectors(task, FACTORS.factors, FACTORS.regularisation, "item_mean", FACTORS.seed)
    for made, rows in ((base.source_users[: len(task.source)], task.source), (base.target_users, task.target)):
        np.testing.assert_allclose(made, raw(rows), atol=1e-6)
    bias, factors = raw(task.items)[:, :1], raw(task.items)[:, 1:]
    np.testing.assert_allclose(base.target_items, torch.cat([torch.ones_like(bias), factors], dim=1), atol=1e-6)
    np.testing.assert_allclose(base.item_offset, task.mean + bias[:, 0], atol=1e-6)
    validation = base.source_users[task.validation.source_row]
    np.testing.assert_allclose(validation, raw(task.validation.source), atol=1e-6)


# --- a slow solution, one row at a time ---------------------------------------------------------------------------


def parts(base: BaseVectors) -> list[np.ndarray]:
    return [x.numpy() for x in (base.source_users, base.source_items, base.target_users, base.target_items)]


@pytest.mark.parametrize("rating_offset", OFFSETS)
def test_base_vectors_against_one_regression_after_the_other(rating_offset: str) -> None:
    task = random_task(seed=3)
    fast = parts(base_vectors(task, 2, 1.5, rating_offset, 4))
    assert fast[0].dtype == np.float64
    for made, expected in zip(fast, slow_base(task, 2, 1.5, rating_offset, 4), strict=True):
        np.testing.assert_allclose(made, expected, atol=1e-8)


# --- offsets ------------------------------------------------------------------------------------------------------


def test_what_the_vectors_are_added_to() -> None:
    task = random_task(seed=1)
    held_out, item = task.validation, task.validation.ratings.item
    offset = {name: base_vectors(task, 2, 5.0, name, 0).offset(held_out) for name in OFFSETS}
    assert not offset["none"].any()
    assert torch.equal(offset["source_offset"], PREDICTORS["source_offset"](held_out, task))
    mean, _, bias = slow_biases(
        list(zip(task.train.user.tolist(), task.train.item.tolist(), task.train.rating.tolist(), strict=True))
    )
    expected = [mean + bias.get(number, 0.0) for number in item.tolist()]
    np.testing.assert_allclose(offset["item_mean"], expected, atol=1e-6)
    assert all(values.dtype == torch.float32 for values in offset.values())


def test_an_overlapping_user_is_fitted_after_the_offset_that_a_held_out_user_gets() -> None:
    task = random_task(seed=1)
    offsets = target_offsets(task, "source_offset")
    np.testing.assert_allclose(offsets.user[: len(task.source)], task.slope * task.source_offset.numpy(), atol=1e-7)
    side = task.train.user == len(task.source)
    left = task.train.rating[side] - task.mean - task.item_offset[task.train.item[side]]
    assert offsets.user[len(task.source)] == pytest.approx(float(left.sum()) / (len(left) + SHRINKAGE), abs=1e-6)


def test_offsets_of_the_source_domain_are_biases_or_nothing() -> None:
    ratings = source_interactions(random_task(seed=2))
    mean, user, item = slow_biases(list(zip(ratings.user, ratings.item, ratings.rating.astype(float), strict=True)))
    for name in ("item_mean", "source_offset"):
        offsets = fitted_offsets(ratings, name)
        np.testing.assert_allclose(offsets.user, [user[number] for number in range(ratings.users)], atol=1e-9)
        rated = np.unique(ratings.item)
        np.testing.assert_allclose(offsets.item[rated], [mean + item[number] for number in rated], atol=1e-9)
    np.testing.assert_array_equal(fitted_offsets(ratings, "none").left(ratings), ratings.rating)


def test_an_item_without_ratings_adds_nothing_to_the_offset() -> None:
    """But for the user's bias, which is part of the vector with item means."""
    task = random_task()
    train, cold = task.train, int(task.train.item[0])
    kept = train.item != cold
    emptied = replace(train, user=train.user[kept], item=train.item[kept], rating=train.rating[kept])
    for name in OFFSETS:
        vector = base_vectors(replace(task, train=emptied), 3, 5.0, name, 0).target_items[cold]
        assert vector.tolist() == ([1.0, 0.0, 0.0, 0.0] if name == "item_mean" else [0.0, 0.0, 0.0])


# --- sharing ------------------------------------------------------------------------------------------------------


def test_trials_of_a_process_share_them_and_another_number_makes_others() -> None:
    task = random_task()
    base = base_vectors(task, 2, 5.0, "none", 0)
    assert base_vectors(task, 2, 5.0, "none", 0) is base
    assert base_vectors(task.to(torch.device("cpu")), 2, 5.0, "none", 0) is base
    others = [(3, 5.0, "none", 0), (2, 6.0, "none", 0), (2, 5.0, "item_mean", 0), (2, 5.0, "none", 1)]
    for other in others:
        assert parts(base_vectors(task, *other))[2].tobytes() != parts(base)[2].tobytes()
    turned = replace(task, train=replace(task.train, rating=6 - task.train.rating))
    assert parts(base_vectors(turned, 2, 5.0, "none", 0))[2].tobytes() != parts(base)[2].tobytes()


def test_offsets_and_vectors_together_rebuild_the_ratings_that_they_were_fitted_to() -> None:
    task = random_task(seed=5)
    ratings = target_interactions(task)
    for name in OFFSETS:
        base = base_vectors(task, 8, 0.01, name, 0)
        offsets = target_offsets(task, name)
        user = np.zeros_like(offsets.user) if name == "item_mean" else offsets.user
        product_N = (base.target_users[ratings.user] * base.target_items[ratings.item]).sum(1).numpy()
        error = Offsets(item=offsets.item, user=user).left(ratings) - product_N
        assert float(np.square(error).mean()) < 0.01 * float(ratings.rating.var())
