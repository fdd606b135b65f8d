"""Recall of real items, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.pseudo.recall import UserItems, measure_recall
from features.store.tables import FeatureTable


def table(ids: list[str], rows: list[list[float]]) -> FeatureTable:
    vectors: Any = np.array(rows, np.float16)
    return FeatureTable(Path("/nowhere"), "k", ids, vectors, {"rows": {"failed": []}})


FOOD = table(["f0", "f1"], [[1, 0], [0, 1]])
KITCHEN = table([f"k{i:02d}" for i in range(40)], [[np.cos(i / 40), np.sin(i / 40)] for i in range(40)])
FIT = [
    UserItems(source=["f0"], target=["k05", "k06"]),
    UserItems(source=["f1"], target=["k05"]),
    UserItems(source=["f1"], target=["k07"]),
]


def measured(pairs: list[UserItems], lists: list[list[str]]) -> dict[tuple[str, int], dict[str, Any]]:
    rows = measure_recall(pairs, lists, FIT, (FOOD, KITCHEN), ("food", "kitchen"), 0)
    return {(row["items"], row["at"]): row for row in rows}


def test_each_list_has_the_recall_that_is_counted_by_hand() -> None:
    held = [
        UserItems(source=["f0"], target=["k05", "k30"]),
        UserItems(source=["f0", "f0"], target=["k00", "k01", "k39"]),
    ]
    rows = measured(held, [["k30", "k31", "k32", "k33", "k34", "k05"], ["k02"]])
    assert (rows["pseudo", 5]["recall"], rows["pseudo", 10]["recall"]) == (0.25, 0.5)
    assert (rows["pseudo", 5]["hit"], rows["pseudo", 5]["different"]) == (0.5, 6)
    assert (rows["popular", 5]["recall"], rows["popular", 5]["different"]) == (0.25, 3)
    assert rows["nearest", 5]["recall"] == pytest.approx((0 + 2 / 3) / 2, abs=1e-5)  # to f0: k00, k01, ...
    assert rows["random", 20]["different"] > 20
    assert {(row["source"], row["target"], row["users"]) for row in rows.values()} == {("food", "kitchen", 2)}


def test_random_items_have_the_recall_of_chance() -> None:
    held = [UserItems(source=["f0"], target=["k03"])] * 2000
    assert measured(held, [[]] * 2000)["random", 10]["recall"] == pytest.approx(0.25, abs=0.03)


def test_nobody_kept_out_gives_no_rows() -> None:
    assert measured([], []) == {}
