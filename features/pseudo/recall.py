"""What pseudo-items are worth: recall of real target items of overlapping users that the generator has not seen.

Beside it, for lists equally long: the most popular items of the other overlapping users, random items, and the items
whose vectors are nearest to the mean vector of what the user has in the source domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from features.pseudo.retrieval import nearest_items
from features.store.tables import FeatureTable

AT = (5, 10, 20)  # list lengths at which recall is measured


@dataclass(frozen=True, kw_only=True)
class Value:
    """One kind of list in one direction. Means over users."""

    source: str
    target: str
    items: str  # "pseudo" | "popular" | "random" | "nearest"
    at: int  # length of the lists
    recall: float  # share of a user's target items that the list holds
    hit: float  # share of users of whose items the list holds any
    users: int
    different: int  # different items in all lists


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One user in one direction: item ids of both domains."""

    source: Sequence[str]
    target: Sequence[str]


def measure_value(
    held: Sequence[Pair],
    pseudo: Sequence[Sequence[str]],
    fit: Sequence[Pair],
    tables: tuple[FeatureTable, FeatureTable],
    names: tuple[str, str],
    seed: int,
) -> list[dict[str, Any]]:
    """Rows (`Value`) of one direction.

    held: users that the generator has not seen, and `pseudo` their lists. fit: the other overlapping users. tables,
    names: of the source and of the target domain.
    """
    if not held:
        return []
    source, target = tables
    count = Counter(item for pair in fit for item in pair.target)
    popular = sorted(count, key=lambda item: (-count[item], item))
    means = np.stack([np.asarray(source.vectors[source.rows(pair.source)], np.float32).mean(0) for pair in held])
    numbers, _ = nearest_items(means, target.vectors, max(AT))
    rng = np.random.default_rng(seed)
    lists: Mapping[str, Sequence[Sequence[str]]] = {
        "pseudo": pseudo,
        "popular": [popular] * len(held),
        "random": [
            [target.ids[n] for n in rng.choice(len(target.ids), min(max(AT), len(target.ids)), replace=False)]
            for _ in held
        ],
        "nearest": [[target.ids[n] for n in row] for row in numbers.tolist()],
    }
    return [asdict(_value(held, found, at, kind, names)) for kind, found in lists.items() for at in AT]


def _value(held: Sequence[Pair], lists: Sequence[Sequence[str]], at: int, kind: str, names: tuple[str, str]) -> Value:
    found = [set(items[:at]) & set(pair.target) for items, pair in zip(lists, held, strict=True)]
    shares = [len(right) / len(set(pair.target)) for right, pair in zip(found, held, strict=True)]
    return Value(
        source=names[0],
        target=names[1],
        items=kind,
        at=at,
        recall=round(float(np.mean(shares)), 5),
        hit=round(sum(map(bool, found)) / len(held), 5),
        users=len(held),
        different=len({item for items in lists for item in items[:at]}),
    )
