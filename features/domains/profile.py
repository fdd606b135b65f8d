"""What a domain is like, measured once when it is prepared: times, ratings, writing of ids, ties, items without text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from features.domains.filters import one_number
from features.domains.notes import Notes

_PARTS = 16  # of the users, whose ties are counted one after another
UNITS: Mapping[
    str, tuple[int, str]
] = {  # unit -> size from which on a number counts it, and how it becomes milliseconds
    "seconds": (10**8, "timestamp * 1000"),  # 1973
    "milliseconds": (10**11, "timestamp"),
    "microseconds": (10**14, "timestamp // 1000"),
    "nanoseconds": (10**17, "timestamp // 1000000"),
}


def find_clock(database: duckdb.DuckDBPyConnection, notes: Notes) -> str:
    """Return the SQL that brings `timestamp` of the view `raw` to milliseconds since 1970; mixed units are noted.

    Numbers that are mostly too small for a clock, such as positions, stay as they are.
    """
    counts = _units(database)
    clocks = {unit: count for unit, count in counts.items() if count and unit != "small"}
    if sum(clocks.values()) <= counts["small"]:
        return "timestamp"
    if len(clocks) > 1:
        shares = ", ".join(f"{count:,} count {unit}" for unit, count in clocks.items())
        notes.add(f"timestamps are in several units ({shares}); all are read as milliseconds since 1970")
    main = max(clocks, key=lambda unit: clocks[unit])
    if counts["small"]:
        notes.add(f"{counts['small']:,} timestamps lie before 1974 while the others are later; they are read as {main}")
    cases = " ".join(f"WHEN abs(timestamp) >= {size} THEN {sql}" for size, sql in reversed(list(UNITS.values())))
    return f"CASE {cases} ELSE {UNITS[main][1]} END"


def _units(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Count the timestamps that are of the size of each unit; `small`: of none."""
    sizes = [size for size, _ in UNITS.values()]
    ends = [*sizes[1:], 2**63 - 1]
    columns = ", ".join(
        f"count_if(abs(timestamp) >= {size} AND abs(timestamp) < {end})" for size, end in zip(sizes, ends, strict=True)
    )
    row = database.execute(f"SELECT count_if(abs(timestamp) < {sizes[0]}), {columns} FROM raw").fetchone()
    assert row is not None
    return {unit: int(count or 0) for unit, count in zip(("small", *UNITS), row, strict=True)}


def profile_raw(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Return what the files hold, before duplicates and filters."""
    counts = _units(database)
    clocks = {unit: count for unit, count in counts.items() if count and unit != "small"}
    times = sum(counts.values())
    kind = "none" if not times else "clock" if sum(clocks.values()) > counts["small"] else "order"
    rating = database.execute(
        "SELECT min(rating), max(rating), approx_count_distinct(rating), coalesce(bool_or(rating <> floor(rating)), false) "
        "FROM raw"
    ).fetchone()
    assert rating is not None
    return {
        "times": {"kind": kind, "units": clocks, "missing": one_number(database, "SELECT count(*) FROM kept") - times},
        "rating": dict(zip(("lowest", "highest", "values", "fractions"), rating, strict=True)),
        "user_ids": _writing(database, "users", "user_id"),
        "item_ids": _writing(database, "items", "item_id"),
    }


def _writing(database: duckdb.DuckDBPyConnection, table: str, column: str) -> dict[str, Any]:
    """Return how ids are written: how many are whole numbers, and whether these are all from the first to the last."""
    number = f"TRY_CAST({column} AS BIGINT)"
    digits = f"regexp_full_match({column}, '[0-9]{{1,18}}')"
    row = database.execute(
        f"SELECT count(*), count_if({digits}), min({number}) FILTER ({digits}), max({number}) FILTER ({digits}) "
        f"FROM {table}"
    ).fetchone()
    assert row is not None
    count, whole, low, high = row
    return {
        "count": count,
        "whole": whole,
        "gapless": bool(count and whole == count and high - low + 1 == count and low <= 1),
    }


def profile_kept(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Return what duplicates and filters left: interactions without a known order, items and users without text.

    Items are those of `item_place`, of which a catalogue may list some that have no interaction.
    """
    tied = """
        SELECT coalesce(sum(n), 0) FROM (
            SELECT count(*) AS n FROM kept WHERE timestamp IS NOT NULL AND u % {parts} = {part}
            GROUP BY u, timestamp HAVING n > 1)
    """  # a part of the users at a time: all groups at once take hundreds of megabytes
    unordered = """
        SELECT count(*) FROM (
            SELECT u FROM kept GROUP BY u HAVING count(*) > 1 AND min(timestamp) IS NOT DISTINCT FROM max(timestamp))
    """
    several = "SELECT count(*) FROM (SELECT u FROM kept GROUP BY u HAVING count(*) > 1)"
    wordless = "SELECT count(*) FROM items WHERE NOT worded AND item_id IN (SELECT item_id FROM item_place)"
    silent = "SELECT count(*) FROM (SELECT u FROM kept GROUP BY u HAVING coalesce(max(words), 0) = 0)"
    ends = database.execute("SELECT min(timestamp), max(timestamp) FROM kept").fetchone()
    assert ends is not None
    queries = {
        "users_unordered": unordered, "users_of_several": several, "items_without_text": wordless,
        "users_without_text": silent,
    }  # fmt: skip
    counts = {name: one_number(database, query) for name, query in queries.items()}
    items = one_number(database, "SELECT count(*) FROM item_place")
    alone = items - one_number(database, "SELECT count(DISTINCT i) FROM kept")
    counts["tied"] = sum(one_number(database, tied.format(parts=_PARTS, part=part)) for part in range(_PARTS))
    return {**counts, "first": ends[0], "last": ends[1], "items": items, "items_alone": alone}
