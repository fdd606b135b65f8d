"""Interactions of one user that share a time: their order is drawn by a seeded hash.

Sorting them by id, row or name would put an order into the data that nobody observed, and make a last item predictable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def tie_hash(user: str, item: str, domain: str, seed: int) -> int:
    """Return the place of an interaction among those of its user at the same time, below 2**63."""
    words = f"{seed}\0{domain}\0{user}\0{item}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") >> 1


def time_order(
    user_N: NDArray[Any], time_N: NDArray[Any], names: Sequence[NDArray[Any]], seed: int
) -> tuple[NDArray[np.int64], int]:
    """Return the order by user, then time, then hash; and how many interactions share user and time with another.

    user_N: numbers of users. names: ids of users, ids of items, and names of domains, each [N].
    """
    order = np.lexsort((time_N, user_N))
    same = (np.diff(user_N[order]) == 0) & (np.diff(time_N[order]) == 0)
    tied = np.zeros(len(order), bool)
    tied[1:] |= same
    tied[:-1] |= same
    rows = order[tied]
    hashes = np.zeros(len(order), np.int64)
    users, items, domains = names
    hashes[rows] = [
        tie_hash(str(user), str(item), str(domain), seed)
        for user, item, domain in zip(users[rows], items[rows], domains[rows], strict=True)
    ]
    return np.lexsort((hashes, time_N, user_N)), len(rows)
