"""The DuckDB in which a domain's tables are joined, filtered and sorted, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb

from features.cores import usable_cores
from features.errors import InputError, one_line

MEMORY_LIMIT = "256MB"  # what does not fit is spilled to disk
THREADS = 2  # each needs its share of the memory


@contextmanager
def open_database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database in the folder, for the block alone. Raises InputError for a full disk and for too little memory."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": min(THREADS, usable_cores()),
        "temp_directory": str(folder / "spill"),
    }
    try:
        with closing(duckdb.connect(str(folder / "work.duckdb"), config=config)) as database:
            database.execute("SET enable_progress_bar = false")
            yield database
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise InputError(
            f"{folder}: DuckDB cannot go on there ({one_line(error, 200)}); make room on that disk and run it again"
        ) from error
