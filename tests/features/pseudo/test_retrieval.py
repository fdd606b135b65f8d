"""Real items for generated texts, against brute force and a plain loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.pseudo.retrieval import choose_items, nearest_by_key, nearest_items
from features.store.shards import VectorStore


def vectors(rows: int, seed: int, width: int = 16) -> NDArray[np.float16]:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float16)


@pytest.mark.parametrize(("texts", "count"), [(1, 1), (700, 5), (3, 40), (3, 99)])
def test_nearest_items_are_those_of_brute_force(texts: int, count: int) -> None:
    ours, items = vectors(texts, 0), vectors(40, 1)
    numbers, cosines = nearest_items(ours, items, count)
    wide = [a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (ours, items)]
    expected = wide[0] @ wide[1].T
    order = np.argsort(-expected, 1)[:, :count]
    np.testing.assert_array_equal(numbers, order)
    np.testing.assert_allclose(cosines, np.take_along_axis(expected, order, 1), atol=1e-6)


def test_equal_items_come_in_the_order_of_their_numbers() -> None:
    items = np.repeat(vectors(2, 0), 5, axis=0)
    numbers, _ = nearest_items(items[7:8], items, 10)
    assert numbers.tolist() == [[5, 6, 7, 8, 9, 0, 1, 2, 3, 4]]


def test_rows_are_found_in_whatever_shard_they_are(tmp_path: Path) -> None:
    store, rows, items = VectorStore.open(tmp_path, "k" * 64), vectors(30, 0), vectors(9, 1)
    keys = [bytes([i] * 16) for i in range(30)]
    for start in range(0, 30, 7):
        part = slice(start, start + 7)
        store.write(keys[part], rows[part], np.ones(len(keys[part]), np.int32))
    wanted = {keys[i] for i in (29, 0, 8, 9)} | {b"x" * 16}
    found = nearest_by_key(store, wanted, items, 4)
    assert set(found) == {keys[i] for i in (0, 8, 9, 29)}
    numbers, cosines = nearest_items(rows, items, 4)
    for i in (0, 8, 9, 29):
        np.testing.assert_array_equal(found[keys[i]][0], numbers[i])
        np.testing.assert_allclose(found[keys[i]][1], cosines[i], rtol=1e-6)


def reference(similarity: NDArray[np.float32], count: int, own: set[int]) -> list[int]:
    """Text by text over the whole matrix [T, I], then by similarity over all that is left."""
    taken: list[int] = []
    for row in similarity[:count]:
        order = [i for i in np.lexsort((np.arange(len(row)), -row)).tolist() if i not in own and i not in taken]
        taken += order[:1]
    best = similarity.max(0)
    rest = [i for i in np.lexsort((np.arange(len(best)), -best)).tolist() if i not in own and i not in taken]
    return [*taken, *rest][:count]


@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(1, 10),
    st.sets(st.integers(0, 11), max_size=6),
)
def test_chosen_items_are_different_not_the_users_own_and_those_of_the_reference(
    seed: int, texts: int, items: int, count: int, own: set[int]
) -> None:
    own = {item for item in own if item < items}
    ours, theirs = vectors(texts, seed), vectors(items, seed + 1)
    numbers, cosines = nearest_items(ours, theirs, count + len(own))
    found = choose_items(list(zip(numbers, cosines, strict=True)), count, own)
    similarity = np.zeros((texts, items), np.float32)
    everything, values = nearest_items(ours, theirs, items)
    np.put_along_axis(similarity, everything.astype(np.int64), values, 1)
    assert found.items == reference(similarity, count, own)
    assert len(found.items) == min(count, items - len(own)) == len(set(found.items))
    assert not own & set(found.items)
    assert all(value in similarity[:, item] for item, value in zip(found.items, found.similarity, strict=True))


def test_a_shorter_list_is_the_beginning_of_a_longer_one() -> None:
    numbers, cosines = nearest_items(vectors(8, 3), vectors(30, 4), 8)
    near = list(zip(numbers, cosines, strict=True))
    whole = choose_items(near, 8).items
    for count in range(1, 9):
        assert choose_items(near, count).items == whole[:count]


def test_without_texts_there_are_no_items() -> None:
    assert choose_items([], 5).items == []
