"""From generated texts to real items (after LGCD eqs. 5 and 6, text by text): cosine, best first, every item once per user.

Legend: T texts, I items of a domain, F width of the vectors, K items kept per text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.store.tables import RowStore

_BLOCK = 512  # texts whose similarities to all items are held at a time

Nearest = tuple[
    NDArray[np.int32], NDArray[np.float32]
]  # numbers of the most similar items, and their cosines; [K] each


@dataclass(frozen=True)
class Found:
    """Items of one user, most wanted first. items: numbers [n]; similarity: cosine of each and the text it is for."""

    items: list[int]
    similarity: list[float]


def nearest_items(vectors_TF: NDArray[Any], items_IF: NDArray[Any], count: int) -> Nearest:
    """Numbers and cosines [T, K] of the `count` items most similar to each text, K = min(count, I).

    Best first, equal ones by number. A block of texts is compared at a time, so memory does not grow with T x I.
    """
    items = _unit(items_IF)
    kept = min(count, len(items))
    numbers = np.empty((len(vectors_TF), kept), np.int32)
    cosines = np.empty((len(vectors_TF), kept), np.float32)
    for start in range(0, len(vectors_TF), _BLOCK):
        value, number = (_unit(vectors_TF[start : start + _BLOCK]) @ items.T).topk(kept)
        order = np.lexsort((number.numpy(), -value.numpy()))
        numbers[start : start + _BLOCK] = np.take_along_axis(number.numpy(), order, 1)
        cosines[start : start + _BLOCK] = np.take_along_axis(value.numpy(), order, 1)
    return numbers, cosines


def _unit(vectors: NDArray[Any]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.array(vectors, np.float32)))


def nearest_of_keys(
    store: RowStore, wanted: Collection[bytes], items_IF: NDArray[Any], count: int
) -> Mapping[bytes, Nearest]:
    """The nearest items of each wanted row of a store, shard by shard: never more than a shard's vectors are held."""
    found: dict[bytes, Nearest] = {}
    left = set(wanted)
    for keys, vectors in _rows(store, left):
        numbers, cosines = nearest_items(vectors, items_IF, count)
        found |= zip(keys, zip(numbers, cosines, strict=True), strict=True)
        left -= set(keys)
    return found


def _rows(store: RowStore, wanted: Collection[bytes]) -> Iterator[tuple[list[bytes], NDArray[Any]]]:
    for shard in store.shards():
        keys = shard["key"].to_pylist()
        here = [row for row, key in enumerate(keys) if key in wanted]
        if here:
            width = shard.schema.field("vector").type.list_size
            vectors = shard["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
            yield [keys[row] for row in here], vectors[here]


def choose_items(nearest: Sequence[Nearest], count: int, own: Collection[int] = ()) -> Found:
    """At most `count` different items, none of `own`: each text in turn takes its most similar item that is left.

    Where there are fewer texts than `count`, the most similar items that are left fill the list. Each text must come
    with at least count + len(own) items, or all there are.
    """
    taken = set(own)
    items: list[int] = []
    similarity: list[float] = []

    def take(item: int, cosine: float) -> None:
        taken.add(item)
        items.append(item)
        similarity.append(cosine)

    for numbers, cosines in nearest[:count]:
        left = next((place for place, item in enumerate(numbers.tolist()) if item not in taken), None)
        if left is not None:
            take(int(numbers[left]), float(cosines[left]))
    if len(items) < count and nearest:
        numbers, cosines = (np.concatenate([text[part] for text in nearest]) for part in (0, 1))
        for place in np.lexsort((numbers, -cosines)).tolist():
            if len(items) == count:
                break
            if int(numbers[place]) not in taken:
                take(int(numbers[place]), float(cosines[place]))
    return Found(items, similarity)
