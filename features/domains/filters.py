"""Filters of interactions, as statements over a DuckDB table: `kept(u, i, rating, words, row)`.

`u` and `i` number users and items; `items(i, described, pictured, titled, worded)` says which items have a description, an
image, a title, and any text at all.
Each filter leaves a smaller `kept`; the work is done out of core, on numbers alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import duckdb

from features.checks import flag, refuse, whole

ITEM_FLAGS = {  # filter -> column of `items` that it asks for
    "require_description": "described", "require_image": "pictured", "require_title": "titled", "require_text": "worded",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """Filters, applied in the order of the fields. MuSiC 4.1.1 has 10 words, description and image, 20 reviews."""

    min_words: int = 0  # reviews with fewer words (title not counted) are dropped
    require_description: bool = False  # items without description are dropped
    require_image: bool = False  # items without image are dropped
    require_title: bool = False  # items without title are dropped
    require_text: bool = False  # items without title, categories and description are dropped
    k_core: int = 0  # users and items with fewer interactions are dropped until none has fewer; 0: off
    min_user_reviews: int = 0  # users with fewer reviews, after the filters above, are dropped

    def __post_init__(self) -> None:
        refuse(
            *(flag(self, name) for name in ITEM_FLAGS),
            *(whole(self, name, least=0) for name in ("min_words", "k_core", "min_user_reviews")),
            place="filters.",
        )


def apply_filters(spec: FilterSpec, database: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Apply each filter of `spec` that is on, yielding `name=value` after each."""
    if spec.min_words:
        _keep(database, f"words >= {spec.min_words}")
        yield f"min_words={spec.min_words}"
    for name, flag_column in ITEM_FLAGS.items():
        if getattr(spec, name):
            _keep(database, f"i IN (SELECT i FROM items WHERE {flag_column})")
            yield f"{name}=true"
    if spec.k_core:
        _core(database, spec)
        yield f"k_core={spec.k_core}"
    if spec.min_user_reviews:
        _keep(database, _frequent("u", spec.min_user_reviews))
        yield f"min_user_reviews={spec.min_user_reviews}"


def _core(database: duckdb.DuckDBPyConnection, spec: FilterSpec) -> None:
    """Keep the largest set in which each item has k interactions and each user k (or `min_user_reviews`, if that is more).

    Users are held to the higher number here, because dropping them afterwards would break the items' core again.
    """
    users = _frequent("u", max(spec.k_core, spec.min_user_reviews))
    while _keep(database, f"{users} AND {_frequent('i', spec.k_core)}"):
        pass


def _frequent(column: str, least: int) -> str:
    return f"{column} IN (SELECT {column} FROM kept GROUP BY {column} HAVING count(*) >= {least})"


def _keep(database: duckdb.DuckDBPyConnection, condition: str) -> int:
    """Keep the interactions that meet `condition`; return how many were dropped."""
    before = one_number(database, "SELECT count(*) FROM kept")
    database.execute(f"CREATE OR REPLACE TABLE kept AS SELECT * FROM kept WHERE {condition}")
    return before - one_number(database, "SELECT count(*) FROM kept")


def one_number(database: duckdb.DuckDBPyConnection, query: str) -> int:
    """Return the single number of a query's result."""
    row = database.execute(query).fetchone()
    assert row is not None
    return int(row[0])
