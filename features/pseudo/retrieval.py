"""Retrieval of real items for generated texts (after LGCD eqs. 5 and 6, text by text): cosine, every item once per user.

Legend: T texts, I items of a domain, F width of the vectors, K items kept per text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.store.shards import VectorStore, shard_vectors

_BLOCK = 512  # texts whose similarities to all items are held at a time

Nearest = tuple[
    NDArray[np.int32], NDArray[np.float32]
]  # numbers of the most similar items, and their cosines; [K] each


@dataclass(frozen=True)
class Retrieved:
    """Items of one user, most wanted first. items: numbers [n]; similarity: cosine of each with its text."""

    items: list[int]
    similarity: list[float]


def nearest_items(vectors_TF: NDArray[Any], items_IF: NDArray[Any], count: int) -> Nearest:
    """Return numbers and cosines [T, K] of the `count` items most similar to each text, K = min(count, I).

    Best first, equal ones by number. A block of texts is compared at a time, so memory does not grow with T x I.
    """
    items = _unit(items_IF)
    kept = min(count, len(items))
    numbers_TK = np.empty((len(vectors_TF), kept), np.int32)
    cosines_TK = np.empty((len(vectors_TF), kept), np.float32)
    for start in range(0, len(vectors_TF), _BLOCK):
        cosine, number = (_unit(vectors_TF[start : start + _BLOCK]) @ items.T).topk(kept)
        order = np.lexsort((number.numpy(), -cosine.numpy()))
        numbers_TK[start : start + _BLOCK] = np.take_along_axis(number.numpy(), order, 1)
        cosines_TK[start : start + _BLOCK] = np.take_along_axis(cosine.numpy(), order, 1)
    return numbers_TK, cosines_TK


def _unit(vectors: NDArray[Any]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.array(vectors, np.float32)))


def nearest_by_key(
    store: VectorStore, wanted: Collection[bytes], items_IF: NDArray[Any], count: int
) -> Mapping[bytes, Nearest]:
    """Return the nearest items of each wanted key of a store, shard by shard: one shard's vectors are held at a time."""
    nearest: dict[bytes, Nearest] = {}
    left = set(wanted)
    for keys, vectors in _wanted_vectors(store, left):
        numbers, cosines = nearest_items(vectors, items_IF, count)
        nearest |= zip(keys, zip(numbers, cosines, strict=True), strict=True)
        left -= set(keys)
    return nearest


def vectors_by_key(store: VectorStore, wanted: Collection[bytes], width: int) -> tuple[list[bytes], NDArray[Any]]:
    """Return those of the wanted keys that a store holds, ascending, and their vectors, [G, width]."""
    left, keys, parts = set(wanted), list[bytes](), [np.empty((0, width), np.float16)]
    for shard_keys, vectors in _wanted_vectors(store, left):
        keys += shard_keys
        parts.append(vectors)
        left -= set(shard_keys)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [keys[place] for place in order], np.concatenate(parts)[order]


def _wanted_vectors(store: VectorStore, wanted: Collection[bytes]) -> Iterator[tuple[list[bytes], NDArray[Any]]]:
    """Yield (keys, their vectors) of each shard that holds any of the wanted keys."""
    for shard in store.shards():
        keys = shard["key"].to_pylist()
        rows = [row for row, key in enumerate(keys) if key in wanted]
        if rows:
            yield [keys[row] for row in rows], shard_vectors(shard)[rows]


def choose_items(nearest: Sequence[Nearest], count: int, excluded: Collection[int] = ()) -> Retrieved:
    """Choose at most `count` different items, none excluded: each text in turn takes its most similar item that is left.

    Where there are fewer texts than `count`, the most similar items that are left fill the list. Each text must come
    with at least count + len(excluded) items, or all there are.
    """
    taken = set(excluded)
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
    return Retrieved(items, similarity)
