"""What DuckDB cannot do is one line."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from features.domains.database import open_database
from features.errors import InputError


@pytest.mark.parametrize("kind", [duckdb.IOException, duckdb.OutOfMemoryException])
def test_a_full_disk_and_too_little_memory_are_one_line(tmp_path: Path, kind: type[duckdb.Error]) -> None:
    told = rf"^{tmp_path}: DuckDB cannot go on there \(no room left\); make room on that disk and run it again$"
    with pytest.raises(InputError, match=told), open_database(tmp_path):
        raise kind("no room\nleft")


def test_a_fault_of_the_query_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(duckdb.CatalogException), open_database(tmp_path) as database:
        database.execute("SELECT * FROM nothing")
