"""Base vectors by one regression after the other, row by row in float64: what `trainables.base_factors` is held against."""

from __future__ import annotations

from itertools import product

import numpy as np

from trainables.base_factors import SWEEPS
from trainables.tasks.rating import SHRINKAGE, Task

Rows = list[tuple[int, int, float]]


def slow_factors(rows: Rows, users: int, items: int, dim: int, ridge: float, seed: int) -> list[np.ndarray]:
    """User and item factors of (user, item, residual) by one ridge regression after the other, float64."""
    item_factors = np.random.default_rng(seed).normal(0.0, 0.1, (items, dim))
    user_factors = np.zeros((users, dim))

    def solve(place: int, size: int, other: np.ndarray) -> np.ndarray:
        solved = np.zeros((size, dim))
        for number in range(size):
            gram, right = ridge * np.eye(dim), np.zeros(dim)
            for row in rows:
                if row[place] == number:
                    q = other[row[1 - place]]
                    gram, right = gram + np.outer(q, q), right + row[2] * q
            solved[number] = np.linalg.inv(gram) @ right
        return solved

    for _ in range(SWEEPS):
        user_factors = solve(0, users, item_factors)
        item_factors = solve(1, items, user_factors)
    return [solve(0, users, item_factors), item_factors]


def slow_biases(rows: Rows) -> tuple[float, dict[int, float], dict[int, float]]:
    """Mean, user and item biases of (user, item, rating), each the shrunken mean of what the others leave."""
    mean = sum(rating for _, _, rating in rows) / len(rows)
    biases: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for _, place in product(range(10), (1, 0)):
        left: dict[int, list[float]] = {}
        for row in rows:
            left.setdefault(row[place], []).append(row[2] - mean - biases[1 - place].get(row[1 - place], 0.0))
        biases[place].update({number: sum(values) / (len(values) + SHRINKAGE) for number, values in left.items()})
    return mean, *biases


def slow_base(task: Task, dim: int, ridge: float, rating_offset: str, seed: int) -> list[np.ndarray]:
    """Source users, source items, target users and target items, as section 3 of the notes on rating baselines says."""
    vectors = []
    for side in ("source", "target"):
        ratings = task.source_ratings if side == "source" else task.train
        rows = list(zip(ratings.user.tolist(), ratings.item.tolist(), ratings.rating.tolist(), strict=True))
        users, items = int(ratings.user.max()) + 1, task.source_items if side == "source" else len(task.items)
        mean, user_bias, item_bias = slow_biases(rows)
        if rating_offset == "none":
            residual = rows
        elif rating_offset == "source_offset" and side == "target":
            own: dict[int, list[float]] = {}
            base = [float(task.mean + task.item_offset[item]) for _, item, _ in rows]  # float32, as the baseline has it
            for (user, _, rating), known in zip(rows, base, strict=True):
                own.setdefault(user, []).append(rating - known)
            offset = {user: sum(values) / (len(values) + SHRINKAGE) for user, values in own.items()}
            offset |= {user: float(task.slope * task.source_offset[user]) for user in range(len(task.source))}
            residual = [(u, i, r - known - offset[u]) for (u, i, r), known in zip(rows, base, strict=True)]
        else:
            residual = [(user, item, r - mean - user_bias[user] - item_bias[item]) for user, item, r in rows]
        p, q = slow_factors(residual, users, items, dim, ridge, seed)
        if rating_offset == "item_mean":
            p, q = np.column_stack([[user_bias[u] for u in range(users)], p]), np.column_stack([np.ones(items), q])
        vectors += [p, q]
    return vectors
