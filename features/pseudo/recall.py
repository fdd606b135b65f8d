"""Recall of pseudo-items: the share of real target items that they hit, of overlapping users kept out of the training.

Beside it, for lists equally long: the most popular items of the other overlapping users, random items, and the items
whose vectors are nearest to the mean vector of the user's source items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from features.pseudo.retrieval import nearest_items
from features.store.tables import FeatureTable

LENGTHS = (5, 10, 20)  # of the lists at which recall is measured


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Recall of one kind of list in one direction; means over users. A row of the manifest and of `pseudo.json`."""

    source: str
    target: str
    items: str  # "pseudo" | "popular" | "random" | "nearest"
    at: int  # length of the lists
    recall: float  # share of a user's target items that the list holds
    hit: float  # share of users whose list holds any of their target items
    users: int
    different: int  # different items in all lists


@dataclass(frozen=True, kw_only=True)
class UserItems:
    """One user in one direction: ids of their items in both domains."""

    source: Sequence[str]
    target: Sequence[str]


def measure_recall(
    held_out: Sequence[UserItems],
    pseudo: Sequence[Sequence[str]],
    fit: Sequence[UserItems],
    tables: tuple[FeatureTable, FeatureTable],
    names: tuple[str, str],
    seed: int,
) -> list[dict[str, Any]]:
    """Return the rows (`Recall`) of one direction.

    held_out: users whom the generator was not trained on, and `pseudo` their lists. fit: the other overlapping users.
    tables, names: of the source and of the target domain.
    """
    if not held_out:
        return []
    source, target = tables
    count = Counter(item for user in fit for item in user.target)
    popular = sorted(count, key=lambda item: (-count[item], item))
    means = np.stack([np.asarray(source.vectors[source.rows(user.source)], np.float32).mean(0) for user in held_out])
    numbers, _ = nearest_items(means, target.vectors, max(LENGTHS))
    rng = np.random.default_rng(seed)
    lists: Mapping[str, Sequence[Sequence[str]]] = {
        "pseudo": pseudo,
        "popular": [popular] * len(held_out),
        "random": [
            [target.ids[n] for n in rng.choice(len(target.ids), min(max(LENGTHS), len(target.ids)), replace=False)]
            for _ in held_out
        ],
        "nearest": [[target.ids[n] for n in row] for row in numbers.tolist()],
    }
    return [
        asdict(_recall(held_out, items, length, kind, names)) for kind, items in lists.items() for length in LENGTHS
    ]


def _recall(
    held_out: Sequence[UserItems], lists: Sequence[Sequence[str]], length: int, kind: str, names: tuple[str, str]
) -> Recall:
    hits = [set(items[:length]) & set(user.target) for items, user in zip(lists, held_out, strict=True)]
    shares = [len(hit) / len(set(user.target)) for hit, user in zip(hits, held_out, strict=True)]
    return Recall(
        source=names[0],
        target=names[1],
        items=kind,
        at=length,
        recall=round(float(np.mean(shares)), 5),
        hit=round(sum(map(bool, hits)) / len(held_out), 5),
        users=len(held_out),
        different=len({item for items in lists for item in items[:length]}),
    )
