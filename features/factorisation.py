"""Rating-based vectors: biased matrix factorisation by alternating least squares (Koren et al. 2009).

These are the "w/o MLLM" features of MuSiC's Table 3: the vectors that rating-only systems work with. Closed-form updates
cost the same whatever the number of users without ratings, and need no learning rate. Shapes: N ratings, U users, I items,
K factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from features.checks import number, refuse, whole

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_CHUNK = 4096  # users or items whose [K, K] systems are held at once


@dataclass(frozen=True, kw_only=True)
class FactorSpec:
    """Settings of the factorisation."""

    factors: int = 8  # K, at least 1; a vector is [bias, K factors]
    bias_shrinkage: float = 5.0  # ratings of the mean that every user and item is given in addition; above 0
    regularisation: float = 15.0  # ridge on the factors, in ratings; above 0
    sweeps: int = 15  # of alternating least squares
    seed: int = 0  # of the first factors

    def __post_init__(self) -> None:
        refuse(
            *(whole(self, name, least=1) for name in ("factors", "sweeps")),
            *(number(self, name, above=0) for name in ("bias_shrinkage", "regularisation")),
            place="ratings.",
        )


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """Ratings of one domain, with users and items numbered."""

    user: Ints  # [N] in 0..users-1
    item: Ints  # [N] in 0..items-1
    rating: NDArray[np.float32]  # [N] rating points
    users: int
    items: int


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """[bias, factors] of one domain's users [U, 1 + K] and items [I, 1 + K], float32; zeros where nothing is rated.

    rating = mean + user bias + item bias + user factors . item factors, each bias shrunk towards 0.
    """

    users: NDArray[np.float32]
    items: NDArray[np.float32]


def factorise(spec: FactorSpec, ratings: Interactions) -> Vectors:
    """Compute the vectors of one domain from the ratings that training may see."""
    centred = ratings.rating.astype(np.float64)
    centred -= centred.mean()
    user_bias, item_bias = biases(
        spec.bias_shrinkage, ratings.user, ratings.item, centred, ratings.users, ratings.items
    )  # fmt: skip
    residual = centred - user_bias[ratings.user] - item_bias[ratings.item]
    user_factors, item_factors = alternating_ridge(spec, ratings, residual)
    return Vectors(
        users=np.column_stack([user_bias, user_factors]).astype(np.float32),
        items=np.column_stack([item_bias, item_factors]).astype(np.float32),
    )


def alternating_ridge(spec: FactorSpec, ratings: Interactions, residual_N: Floats) -> tuple[Floats, Floats]:
    """User [U, K] and item [I, K] factors of what offsets leave of the ratings, in float64; the users' are solved last.

    Objective: min over p, q of sum (residual - p . q)^2 + regularisation * (sum |p|^2 + sum |q|^2).
    """
    by_user = csr_matrix((residual_N, (ratings.user, ratings.item)), (ratings.users, ratings.items))
    by_item = by_user.T.tocsr()
    item_factors = np.random.default_rng(spec.seed).normal(0.0, 0.1, (ratings.items, spec.factors))
    for _ in range(spec.sweeps):
        user_factors = ridge_regressions(by_user, item_factors, spec.regularisation)
        item_factors = ridge_regressions(by_item, user_factors, spec.regularisation)
    return ridge_regressions(by_user, item_factors, spec.regularisation), item_factors


def biases(
    shrinkage: float, user_N: Ints, item_N: Ints, centred_N: Floats, users: int, items: int, sweeps: int = 10
) -> tuple[Floats, Floats]:
    """Compute user [U] and item [I] offsets of centred ratings, each the shrunken mean of what the other leaves."""
    user_bias, item_bias = np.zeros(users), np.zeros(items)
    user_n = np.bincount(user_N, minlength=users) + shrinkage
    item_n = np.bincount(item_N, minlength=items) + shrinkage
    for _ in range(sweeps):
        item_bias = np.bincount(item_N, centred_N - user_bias[user_N], minlength=items) / item_n
        user_bias = np.bincount(user_N, centred_N - item_bias[item_N], minlength=users) / user_n
    return user_bias, item_bias


def ridge_regressions(
    residual: csr_matrix, other: Floats, ridge: float | Floats, weight_N: Floats | None = None
) -> Floats:
    """Solve for the least-squares factors [rows, K] of the rows of `residual`, given the factors of its columns.

    p_u = (sum w q q^T + ridge_u * I)^-1 sum w * residual * q, the sums over what u has rated; q are the rows of `other`, w
    the weights of the entries of `residual` in their order, or 1.
    """
    weight_N = np.ones_like(residual.data) if weight_N is None else weight_N
    weights = csr_matrix((weight_N, residual.indices, residual.indptr), residual.shape)
    right = csr_matrix((weight_N * residual.data, residual.indices, residual.indptr), residual.shape) @ other
    ridge_R = np.broadcast_to(ridge, len(right))
    rated = np.flatnonzero(np.diff(residual.indptr))  # what has no rating stays 0, and costs nothing
    for start in range(0, len(rated), _CHUNK):
        part = rated[start : start + _CHUNK]
        gram = _gram(weights[part], other) + ridge_R[part, None, None] * np.eye(other.shape[1])
        right[part] = np.linalg.solve(gram, right[part, :, None])[..., 0]
    return np.asarray(right)


def _gram(block: csr_matrix, other: Floats) -> Floats:
    """Sum of w q q^T over each row's columns, w its entries, [rows, K, K].

    A column of it at a time, so that nothing is as large as [I, K, K].
    """
    used = np.zeros(len(other), bool)
    used[block.indices] = True
    place = np.cumsum(used, dtype=np.int32) - 1
    q = other[used]
    weights = csr_matrix((block.data, place[block.indices], block.indptr), (block.shape[0], len(q)))
    gram = np.empty((block.shape[0], q.shape[1], q.shape[1]))
    for column in range(q.shape[1]):
        gram[:, column:, column] = gram[:, column, column:] = weights @ (q[:, column:] * q[:, column, None])
    return gram
