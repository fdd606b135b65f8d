"""Rating-based vectors: every update against a slow solution of its own least-squares problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from features.errors import InputError
from features.factorisation import FactorSpec, Interactions, biases, factorise, ridge_regressions


def interactions(seed: int, users: int = 40, items: int = 25, each: int = 8, rated: int | None = None) -> Interactions:
    """Ratings of rank two; users from `rated` on have none."""
    draw = np.random.default_rng(seed)
    taste, kind = np.random.default_rng(9).normal(size=(users, 2)), draw.normal(size=(items, 2))
    user = np.repeat(np.arange(rated or users), each)
    item = np.concatenate([draw.choice(items, each, replace=False) for _ in range(rated or users)])
    rating = 3 + (taste[user] * kind[item]).sum(1) + 0.1 * draw.normal(size=len(user))
    return Interactions(user=user, item=item, rating=rating.astype(np.float32), users=users, items=items)


def test_every_row_solves_its_own_ridge_regression() -> None:
    draw = np.random.default_rng(0)
    dense = np.where(draw.random((30, 20)) < 0.3, draw.normal(size=(30, 20)), 0.0)
    other = draw.normal(size=(20, 4))
    solved = ridge_regressions(csr_matrix(dense), other, 1.5)
    for row in range(30):
        rated = np.flatnonzero(dense[row])
        x = other[rated]
        expected = np.linalg.inv(x.T @ x + 1.5 * np.eye(4)) @ x.T @ dense[row, rated]
        np.testing.assert_allclose(solved[row], expected, atol=1e-10)


def test_rows_without_ratings_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    dense = np.where(draw.random((30, 20)) < 0.3, draw.normal(size=(30, 20)), 0.0)
    dense[7] = 0.0
    other = draw.normal(size=(20, 3))
    whole = ridge_regressions(csr_matrix(dense), other, 2.0)
    monkeypatch.setattr("features.factorisation._CHUNK", 4)
    np.testing.assert_array_equal(ridge_regressions(csr_matrix(dense), other, 2.0), whole)
    assert not whole[7].any()


def test_biases_are_the_fixed_point_of_shrunken_means() -> None:
    data = interactions(2)
    centred = data.rating.astype(np.float64) - data.rating.mean()
    user, item = biases(5.0, data.user, data.item, centred, data.users, data.items, sweeps=300)
    for number in range(data.users):
        own = centred[data.user == number] - item[data.item[data.user == number]]
        assert user[number] == pytest.approx(own.sum() / (len(own) + 5), abs=1e-9)
    for number in range(data.items):
        own = centred[data.item == number] - user[data.user[data.item == number]]
        assert item[number] == pytest.approx(own.sum() / (len(own) + 5), abs=1e-9)


def test_ten_sweeps_of_biases_are_near_the_fixed_point() -> None:
    data = interactions(2)
    centred = data.rating.astype(np.float64) - data.rating.mean()
    few, many = (biases(5.0, data.user, data.item, centred, data.users, data.items, n) for n in (10, 300))
    np.testing.assert_allclose(few[0], many[0], atol=1e-3)
    np.testing.assert_allclose(few[1], many[1], atol=1e-3)


def test_vectors_rebuild_the_ratings_they_came_from() -> None:
    data = interactions(3)
    vectors = factorise(FactorSpec(factors=2, regularisation=0.5), data)
    assert vectors.users.shape == (40, 3)
    assert vectors.items.shape == (25, 3)
    assert vectors.users.dtype == vectors.items.dtype == np.float32
    users, items = vectors.users[data.user], vectors.items[data.item]
    rebuilt = data.rating.mean() + users[:, 0] + items[:, 0] + (users[:, 1:] * items[:, 1:]).sum(1)
    assert np.var(data.rating - rebuilt) < 0.2 * np.var(data.rating)


def test_every_sweep_lowers_the_regularised_loss() -> None:
    data = interactions(4)

    def loss(sweeps: int) -> float:
        spec = FactorSpec(factors=2, regularisation=2.0, sweeps=sweeps)
        vectors = factorise(spec, data)
        users, items = vectors.users.astype(np.float64), vectors.items.astype(np.float64)
        rebuilt = users[data.user, 0] + items[data.item, 0] + (users[data.user, 1:] * items[data.item, 1:]).sum(1)
        left = data.rating - data.rating.mean(dtype=np.float64) - rebuilt
        return float((left**2).sum() + 2.0 * ((users[:, 1:] ** 2).sum() + (items[:, 1:] ** 2).sum()))

    losses = [loss(sweeps) for sweeps in (1, 2, 4, 8, 16)]
    assert losses == sorted(losses, reverse=True)


def test_users_without_ratings_have_zeros() -> None:
    vectors = factorise(FactorSpec(factors=3), interactions(8, rated=30))
    assert not vectors.users[30:].any()
    assert vectors.users[:30].any(axis=1).all()


def test_a_users_vector_is_made_from_his_ratings_given_the_items() -> None:
    data = interactions(4)
    vectors = factorise(FactorSpec(factors=2, regularisation=3.0), data)
    centred = data.rating - data.rating.mean(dtype=np.float64)
    user_bias, item_bias = biases(5.0, data.user, data.item, centred, 40, 25)
    for user in (0, 17, 39):
        rows = data.user == user
        x = vectors.items[data.item[rows], 1:].astype(np.float64)
        left = centred[rows] - user_bias[user] - item_bias[data.item[rows]]
        expected = np.linalg.solve(x.T @ x + 3.0 * np.eye(2), x.T @ left)
        np.testing.assert_allclose(vectors.users[user], [user_bias[user], *expected], atol=1e-4)


def test_the_seed_decides_and_nothing_else() -> None:
    data = interactions(4)
    first, again = (factorise(FactorSpec(factors=2), data) for _ in range(2))
    np.testing.assert_array_equal(first.users, again.users)
    other = factorise(FactorSpec(factors=2, seed=1, sweeps=1), data)
    assert np.abs(other.users - first.users).max() > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factors": 0}, r"^ratings\.factors is 0; give a whole number of at least 1$"),
        ({"bias_shrinkage": 0}, r"^ratings\.bias_shrinkage is 0; give a number above 0$"),
        ({"regularisation": -1.0}, r"^ratings\.regularisation is -1\.0; give a number above 0$"),
        ({"sweeps": 0}, r"^ratings\.sweeps is 0; give a whole number of at least 1$"),
        ({"regularisation": float("nan")}, r"^ratings\.regularisation is nan; give a finite number"),
    ],
)
def test_a_number_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FactorSpec(**values)
