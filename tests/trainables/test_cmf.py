"""CMF: known answers, planted ratings, an objective that falls, a slow reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from trainables.base_factors import base_vectors
from trainables.baselines.rating import PREDICTORS
from trainables.models.cmf import CMF, BothDomains, Config, both_domains, objective, solved_items, solved_users, train
from trainables.tasks.rating import SHRINKAGE, Ratings, Task

from .slow_base import slow_biases
from .worlds import normal, planted_task, random_task, uneven

PLAIN = {"rating_offset": "none", "calibrate": False}


def swept(task: Task, **config: Any) -> CMF:
    """The model after all sweeps, without the runner."""
    settings = Config(**config)
    model = CMF(settings, task, both_domains(settings, task), 0)
    for _ in range(settings.epochs):
        model.sweep()
    return model


@pytest.mark.parametrize(
    ("weight", "ridge", "factor"), [(0.5, 1e-12, 1.8), (0.25, 1e-12, 25 / 13), (0.25, 1.5, 1.5625)]
)
def test_a_user_between_two_domains(weight: float, ridge: float, factor: float) -> None:
    """A source-domain residual of 1 on q = 1 and one of 4 on q = 2 in the target domain."""
    by_user = csr_matrix(np.array([[1.0, 4.0]]))
    ratings = BothDomains(
        by_user=by_user, by_item=by_user.T.tocsr(), item_weight=np.array([2 * weight, 2 - 2 * weight]), source_items=1,
        source_users=1, user_bias=np.zeros(1), item_offset=np.zeros(1),
    )  # fmt: skip
    config = Config(dim=1, ridge=ridge, source_weight=weight)
    assert solved_users(config, ratings, np.array([[1.0], [2.0]])) == pytest.approx(factor, abs=1e-9)


@pytest.mark.parametrize(("weight", "side"), [(0.0, "target"), (1.0, "source")])
def test_without_the_other_domain_it_is_the_factorisation_of_one(weight: float, side: str) -> None:
    """Its ratings then count twice, so the penalty is half as large."""
    task = random_task(seed=3)
    model = swept(task, **PLAIN, dim=2, ridge=3.0, source_weight=weight)
    base = base_vectors(task, 2, 1.5, "none", 0)
    users = slice(0, len(task.source))
    for made, alone in ((getattr(model.base, f"{side}_users")[users], getattr(base, f"{side}_users")[users]),
                        (getattr(model.base, f"{side}_items"), getattr(base, f"{side}_items"))):  # fmt: skip
        torch.testing.assert_close(made, alone, atol=1e-9, rtol=0)


def test_without_the_source_domain_cold_start_users_get_the_offset() -> None:
    task = random_task()
    rated = swept(task, source_weight=0.0).predict(task.validation, task, 0)
    assert torch.equal(rated, PREDICTORS["source_offset"](task.validation, task))


def thinned(ratings: Ratings, seed: int, share: float) -> Ratings:
    kept = torch.rand(len(ratings), generator=torch.Generator().manual_seed(seed)) < share
    return Ratings(ratings.user[kept], ratings.item[kept], ratings.rating[kept])


def test_users_shared_by_two_domains_are_recovered_from_one() -> None:
    """Rank 2, no noise, 40 % of the ratings; what held-out users rate in the target domain is in no training row."""
    task = planted_task(rank=2, users=60, held_out=10, items=40)
    taste, kind_s, kind_t = normal(0, 70, 2), normal(1, 40, 2), normal(2, 40, 2)

    def rated(ratings: Ratings, first: int, kind: torch.Tensor) -> Ratings:
        return replace(ratings, rating=(taste[first + ratings.user] * kind[ratings.item]).sum(dim=1).float())

    target = thinned(rated(task.train, 0, kind_t), 1, 0.4)
    validation = replace(task.validation, ratings=rated(task.validation.ratings, 60, kind_t))
    source = thinned(rated(task.source_ratings, 0, kind_s), 2, 0.4)
    task = replace(task, source_ratings=source, train=target, overlapping=target, validation=validation)
    model = swept(task, **PLAIN, dim=2, ridge=1e-9, epochs=60)
    error_N = model.predict(task.validation, task, 0) - task.validation.ratings.rating
    assert float(error_N.square().mean().sqrt()) < 1e-3


@pytest.mark.parametrize("by_count", [False, True])
def test_the_objective_falls_and_its_gradient_vanishes(by_count: bool) -> None:
    settings = Config(dim=2, ridge=2.0, source_weight=0.3, rating_offset="none", ridge_by_count=by_count)
    ratings = both_domains(settings, uneven(random_task(seed=2)))
    items = normal(0, ratings.by_user.shape[1], 2).numpy()
    values = []
    for _ in range(400):
        users = solved_users(settings, ratings, items)
        values.append(objective(settings, ratings, users, items))
        items = solved_items(settings, ratings, users)
        values.append(objective(settings, ratings, users, items))
    assert (np.diff(values) < 1e-9 * values[0]).all()
    users = solved_users(settings, ratings, items)
    tables = [torch.from_numpy(table).requires_grad_() for table in (users, items)]
    loss = torch.zeros((), dtype=torch.float64)
    rows, columns = ratings.by_user.nonzero()
    for user, item in zip(rows, columns, strict=True):  # the objective from the text, one rating at a time
        error = ratings.by_user[user, item] - tables[0][user] @ tables[1][item]
        loss = loss + float(ratings.item_weight[item]) * error**2
    for table, index in zip(tables, (rows, columns), strict=True):
        count = np.bincount(index, minlength=len(table)).clip(1.0) if by_count else np.ones(len(table))
        loss = loss + settings.ridge * (torch.from_numpy(count) @ table.square().sum(dim=1))
    assert loss.item() == pytest.approx(objective(settings, ratings, users, items), rel=1e-12)
    loss.backward()
    assert all(float(table.grad.abs().max()) < 1e-8 for table in tables if table.grad is not None)


def slow_users(task: Task, items: np.ndarray, config: Config) -> np.ndarray:
    """Vectors of all source users for given items, one rating at a time; item means of each domain, one user bias."""
    first_side = len(task.source_ratings.starts) - 1
    place = lambda user: user if user < len(task.source) else first_side + user - len(task.source)  # noqa: E731
    source = list(zip(*(x.tolist() for x in (task.source_ratings.user, task.source_ratings.item)), strict=True))
    target = [
        (place(u), task.source_items + i)
        for u, i in zip(task.train.user.tolist(), task.train.item.tolist(), strict=True)
    ]
    left = []
    means = [float(r.rating.double().mean()) for r in (task.source_ratings, task.train)]
    for rows, ratings, mean in ((source, task.source_ratings, means[0]), (target, task.train, means[1])):
        left += [(u, i, r - mean) for (u, i), r in zip(rows, ratings.rating.tolist(), strict=True)]
    shift, user_bias, item_bias = slow_biases(left)
    solved = np.zeros((first_side, config.dim + 1))
    weights = [2 * config.source_weight, 2 * (1 - config.source_weight)]
    for user in range(first_side):
        gram, right = config.ridge * np.eye(config.dim), np.zeros(config.dim)
        for u, i, r in left:
            if u == user:
                weight, q = weights[i >= task.source_items], items[i]
                gram = gram + weight * np.outer(q, q)
                right = right + weight * (r - shift - user_bias[u] - item_bias[i]) * q
        solved[user] = [user_bias[user], *(np.linalg.inv(gram) @ right)]
    return solved


def test_users_against_the_slow_reference_with_shared_biases() -> None:
    task = uneven(random_task(seed=7))
    model = swept(task, dim=3, ridge=2.0, source_weight=0.3, rating_offset="item_mean", epochs=4)
    items = model.items[:, 1:].numpy()
    expected = slow_users(task, items, model.config)
    torch.testing.assert_close(model.base.source_users, torch.from_numpy(expected), atol=1e-7, rtol=0)
    one, item = task.validation.ratings, model.base.target_items
    rated = model.predict(task.validation, task, 0)
    known = (
        model.base.item_offset[one.item[3]]
        + expected[task.validation.source_row[one.user[3]]] @ item[one.item[3]].numpy()
    )
    assert float(rated[3]) == pytest.approx(float(known), abs=1e-5)


def test_side_users_take_part_unless_they_are_left_out() -> None:
    task = random_task(seed=5)
    full, left = (both_domains(Config(side_users=flag), task) for flag in (True, False))
    assert full.by_user.nnz - left.by_user.nnz == int((task.train.user >= len(task.source)).sum())
    assert left.by_user[left.source_users :].nnz == 0
    known = task.overlapping
    mean = known.rating.double().mean()
    for item in range(len(task.items)):
        of_item = known.rating[known.item == item].double() - mean
        assert left.item_offset[item] == pytest.approx(
            float(mean + of_item.sum() / (len(of_item) + SHRINKAGE)), abs=1e-5
        )
    assert not np.allclose(left.item_offset, full.item_offset), (
        "nor do side users stand in what the factors are added to"
    )


def test_epochs_are_sweeps() -> None:
    task = random_task(seed=5)
    model, places = swept(task, epochs=2), train(Config(), task, 0)
    setup, *_, second = [next(places) for _ in range(3)]
    assert torch.equal(setup.network.state_dict()["users"], model.users)  # type: ignore[union-attr]
    assert second.metrics["train_loss"] > 0  # type: ignore[union-attr]
