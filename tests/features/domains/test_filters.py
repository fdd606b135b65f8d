"""Filters against slow references written in plain Python."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pytest

from features.domains.filters import FilterSpec, apply_filters
from features.errors import InputError

Row = tuple[int, int, int]  # user, item, words


@pytest.fixture
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


def filtered(database: duckdb.DuckDBPyConnection, rows: list[Row], spec: FilterSpec) -> tuple[list[Row], list[str]]:
    database.execute("CREATE OR REPLACE TABLE kept (u INTEGER, i INTEGER, words INTEGER)")
    database.executemany("INSERT INTO kept VALUES (?, ?, ?)", rows)
    # Items 0, 3, 6.. have no description, items 0, 4, 8.. no image.
    database.execute(
        "CREATE OR REPLACE TABLE items AS SELECT i, i % 3 > 0 AS described, i % 4 > 0 AS pictured FROM range(99) t(i)"
    )
    steps = list(apply_filters(spec, database))
    return sorted(database.execute("SELECT * FROM kept").fetchall()), steps


def core(rows: list[Row], users: int, items: int) -> list[Row]:
    """Drop one offender at a time until there is none."""
    rows = list(rows)
    while True:
        by_user, by_item = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        bad = next((row for row in rows if by_user[row[0]] < users or by_item[row[1]] < items), None)
        if bad is None:
            return sorted(rows)
        rows.remove(bad)


@pytest.fixture
def rows() -> list[Row]:
    rng = np.random.default_rng(1)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.geometric(0.08, 400), rng.geometric(0.1, 400), strict=True)})
    return [(u, min(i, 98), int(rng.integers(0, 20))) for u, i in pairs]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_k_core(database: duckdb.DuckDBPyConnection, rows: list[Row], k: int) -> None:
    kept, steps = filtered(database, rows, FilterSpec(k_core=k))
    assert kept == core(rows, k, k)
    assert kept
    assert steps == [f"k_core={k}"]


def test_k_core_of_a_chain_is_empty(database: duckdb.DuckDBPyConnection) -> None:
    """Each round frees only the next link, so that the fixed point takes as many rounds as there are links."""
    chain = [(n, n, 9) for n in range(20)] + [(n + 1, n, 9) for n in range(20)]
    assert filtered(database, chain, FilterSpec(k_core=2))[0] == []


def test_k_core_and_user_reviews_hold_together(database: duckdb.DuckDBPyConnection, rows: list[Row]) -> None:
    kept, _ = filtered(database, rows, FilterSpec(k_core=3, min_user_reviews=7))
    assert kept == core(rows, 7, 3)
    assert kept
    assert kept != filtered(database, rows, FilterSpec(k_core=3))[0]


def test_filters_go_in_the_order_of_their_fields(database: duckdb.DuckDBPyConnection, rows: list[Row]) -> None:
    spec = FilterSpec(min_words=5, require_description=True, require_image=True, min_user_reviews=3)
    kept, steps = filtered(database, rows, spec)
    expected = [row for row in rows if row[2] >= 5 and row[1] % 3 and row[1] % 4]
    reviews = Counter(row[0] for row in expected)
    assert kept == sorted(row for row in expected if reviews[row[0]] >= 3)
    assert steps == ["min_words=5", "require_description=true", "require_image=true", "min_user_reviews=3"]


def test_no_filter_does_nothing(database: duckdb.DuckDBPyConnection, rows: list[Row]) -> None:
    assert filtered(database, rows, FilterSpec()) == (sorted(rows), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_words": -1}, "filters.min_words is -1; give a whole number of at least 0"),
        ({"k_core": 2.0}, "filters.k_core is 2.0; give a whole number of at least 0"),
        ({"min_user_reviews": True}, "filters.min_user_reviews is True; give a whole number of at least 0"),
        ({"require_image": 1}, "filters.require_image is 1; give true or false"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        FilterSpec(**change)
