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

from features.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_CHUNK = 4096  # users or items whose [K, K] systems are held at once


@dataclass(frozen=True, kw_only=True)
class FactorSpec:
    """How rating-based vectors are made."""

    factors: int = 8  # K, at least 1; a vector is [bias, K factors]
    bias_shrinkage: float = 5.0  # ratings of the mean that every user and item is taken to have; above 0
    regularisation: float = 15.0  # ridge on the factors, in ratings; above 0
    sweeps: int = 15  # of alternating least squares
    seed: int = 0  # of the first factors

    def __post_init__(self) -> None:
        for name, least in (("factors", 1), ("bias_shrinkage", 1e-9), ("regularisation", 1e-9), ("sweeps", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"ratings.{name} is {getattr(self, name)}; give a number of at least {least:g}")


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What was fitted: rating = mean + user bias + item bias + user factors . item factors."""

    mean: float
    user_bias: Floats  # [U] shrunk towards 0
    item_bias: Floats  # [I] shrunk towards 0
    user_factors: Floats  # [U, K]
    item_factors: Floats  # [I, K]

    @property
    def user_vectors(self) -> NDArray[np.float32]:
        """[U, 1 + K] float32: bias and factors; zeros for a user without ratings."""
        return np.column_stack([self.user_bias, self.user_factors]).astype(np.float32)

    @property
    def item_vectors(self) -> NDArray[np.float32]:
        """[I, 1 + K] float32."""
        return np.column_stack([self.item_bias, self.item_factors]).astype(np.float32)


def factorise(
    spec: FactorSpec, user_N: Ints, item_N: Ints, rating_N: NDArray[np.float32], users: int, items: int
) -> Factors:
    """Fit the ratings of one domain; users and items are numbered 0..users-1 and 0..items-1."""
    rating = rating_N.astype(np.float64)
    mean = float(rating.mean())
    user_bias, item_bias = biases(spec.bias_shrinkage, user_N, item_N, rating - mean, users, items)
    residual = csr_matrix((rating - mean - user_bias[user_N] - item_bias[item_N], (user_N, item_N)), (users, items))
    rows, columns = residual, residual.T.tocsr()
    rng = np.random.default_rng(spec.seed)
    item_factors = rng.normal(0.0, 0.1, (items, spec.factors))
    for _ in range(spec.sweeps):
        user_factors = _solve(rows, item_factors, spec.regularisation)
        item_factors = _solve(columns, user_factors, spec.regularisation)
    user_factors = _solve(rows, item_factors, spec.regularisation)
    return Factors(
        mean=mean, user_bias=user_bias, item_bias=item_bias, user_factors=user_factors, item_factors=item_factors
    )


def biases(
    shrinkage: float, user_N: Ints, item_N: Ints, centred_N: Floats, users: int, items: int, sweeps: int = 10
) -> tuple[Floats, Floats]:
    """User [U] and item [I] offsets of centred ratings, each the shrunken mean of what the other leaves."""
    user_bias, item_bias = np.zeros(users), np.zeros(items)
    user_n = np.bincount(user_N, minlength=users) + shrinkage
    item_n = np.bincount(item_N, minlength=items) + shrinkage
    for _ in range(sweeps):
        item_bias = np.bincount(item_N, centred_N - user_bias[user_N], minlength=items) / item_n
        user_bias = np.bincount(user_N, centred_N - item_bias[item_N], minlength=users) / user_n
    return user_bias, item_bias


def _solve(residual: csr_matrix, other: Floats, ridge: float) -> Floats:
    """Least-squares factors of each row of `residual` given the factors of its columns, [rows, K]."""
    factors = other.shape[1]
    right = residual @ other
    solved = np.zeros((residual.shape[0], factors))
    pairs = (other[:, :, None] * other[:, None, :]).reshape(len(other), -1)
    for start in range(0, residual.shape[0], _CHUNK):
        block = residual[start : start + _CHUNK]
        present = csr_matrix((np.ones_like(block.data), block.indices, block.indptr), block.shape)
        gram = (present @ pairs).reshape(-1, factors, factors) + ridge * np.eye(factors)
        solved[start : start + _CHUNK] = np.linalg.solve(gram, right[start : start + _CHUNK, :, None])[..., 0]
    return solved
