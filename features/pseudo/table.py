"""The table of pseudo-items: for each single-domain user, real items of the other domain, and the texts behind them.

<folder>/pseudo.parquet     user_id, items (list of item ids, most wanted first), similarity (list of cosines), texts, and
                            the row of each text in vectors.npy (-1: it could not be encoded)
<folder>/vectors.npy        [G, F] vectors of the different texts
<folder>/manifest.json      key, what it was made from, and figures
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.errors import InputError
from features.store.folders import whole_folder, write_json

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.string())),
        ("similarity", pa.list_(pa.float32())),
        ("texts", pa.list_(pa.string())),
        ("text_rows", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class PseudoTable:
    """Pseudo-items of users, on disk."""

    path: Path  # its folder
    key: str  # sha256 over all that made it

    @property
    def vectors(self) -> Path:
        """File with the vectors of the different texts, [G, F]."""
        return self.path / "vectors.npy"

    def rows(self, users: Sequence[str]) -> tuple[list[list[str]], list[list[float]]]:
        """Return item ids and similarities of each user, most wanted first; empty for a user who is not in the table."""
        items, similarity = self._of_users(users, ["items", "similarity"])
        return items, similarity

    def text_rows(self, users: Sequence[str]) -> list[list[int]]:
        """Return the rows of each user's texts among the vectors, -1 for one without; empty for an unknown user."""
        (rows,) = self._of_users(users, ["text_rows"])
        return rows

    def _of_users(self, users: Sequence[str], columns: list[str]) -> list[list[list[Any]]]:
        table = pq.read_table(self.path / "pseudo.parquet", columns=["user_id", *columns])
        place = {user: row for row, user in enumerate(table["user_id"].to_pylist())}
        rows = [place.get(user, -1) for user in users]
        values = [table[column].to_pylist() for column in columns]
        return [[value[row] if row >= 0 else [] for row in rows] for value in values]


def write_pseudo(
    path: Path, table: pa.Table, vectors_GF: NDArray[np.floating[Any]], manifest: Mapping[str, Any]
) -> PseudoTable:
    """Publish a table (SCHEMA, a row a user) with its manifest, which holds the key, as the folder `path`."""
    with whole_folder(path) as partial:
        pq.write_table(table.cast(SCHEMA), partial / "pseudo.parquet", compression="zstd")
        np.save(partial / "vectors.npy", vectors_GF)
        write_json(partial / "manifest.json", manifest)
    return open_pseudo(path, manifest["key"])


def open_pseudo(path: Path, key: str | None = None) -> PseudoTable:
    """Open a finished table; where `key` is given, the table must have that key."""
    try:
        stored_key = str(json.loads((path / "manifest.json").read_text())["key"])
    except FileNotFoundError:
        raise InputError(f"{path}: no finished pseudo-interactions here; run `study extract` on the plan") from None
    except ValueError as error:
        raise InputError(f"{path}/manifest.json: not JSON ({error}); delete the folder and make it again") from None
    if key is not None and key != stored_key:
        raise InputError(f"{path}: holds key {stored_key[:12]}, not {key[:12]}; delete the folder and make it again")
    return PseudoTable(path, stored_key)
