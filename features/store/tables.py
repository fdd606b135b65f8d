"""The aligned feature table that trials open: the vectors of all users or all items of one domain.

    <store>/features/<domain>-<kind>-<key[:12]>/     ids.parquet, vectors.npy [N, F], manifest.json

A table is put together from the shards of its encoder (`features.store.shards`) and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.errors import InputError, one_line
from features.store.folders import mapped_array, store_errors, whole_folder, write_json
from features.store.shards import VectorStore, shard_vectors


def digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON document, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Vectors of the users or items of one domain, memory-mapped and read-only: trials share one copy of the pages.

    ids: sorted; vectors[i] belongs to ids[i]. vectors: [N, F], float16 or float32. Rows that failed are absent and listed
    in manifest["rows"]["failed"]. Pickled as its path, so sending one to a worker copies nothing.
    """

    path: Path
    key: str
    ids: list[str]
    vectors: np.memmap[Any, np.dtype[Any]]
    manifest: Mapping[str, Any]

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the row number of each id [len(ids)]. Raises InputError for ids without a vector, naming the first."""
        rows = self._index.get_indexer(pd.Index(ids, dtype=object)).astype(np.int64)
        if (unknown := np.flatnonzero(rows < 0)).size:
            name = ids[int(unknown[0])]
            reason = next(
                (row["reason"] for row in self.manifest["rows"]["failed"] if row["id"] == name), "not in the domain"
            )
            raise InputError(
                f"{self.path}: no vector for {unknown.size} of {len(ids)} ids, the first is {name!r} ({reason}); "
                "extract features of the domain that holds them, or leave them out"
            )
        return rows

    @cached_property
    def _index(self) -> pd.Index[Any]:
        return pd.Index(self.ids, dtype=object)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_table, (self.path, self.key)


def table_path(store: Path, domain: str, kind: str, key: str) -> Path:
    """Return the folder of the feature table of one domain and kind ("items" or "users")."""
    return store / "features" / f"{domain}-{kind}-{key[:12]}"


def open_table(path: Path, key: str | None = None) -> FeatureTable:
    """Open a finished table; where `key` is given, the table must have that key.

    Raises InputError for a table that is missing, unfinished, broken or made by another encoder.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        ids = pq.read_table(path / "ids.parquet")["id"].to_pylist()
        vectors = np.load(path / "vectors.npy", mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no finished feature table ({Path(error.filename).name} is missing); extract it"
        ) from error
    except (ValueError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: broken feature table ({one_line(error)}); delete the folder and extract again"
        ) from error
    if key is not None and manifest["key"] != key:
        raise InputError(
            f"{path}: written by another encoder or from other rows (encoder {manifest['encoder']['model']}, key "
            f"{manifest['key'][:12]}, expected {key[:12]}); delete the folder and extract again"
        )
    if vectors.ndim != 2 or len(ids) != len(vectors) or len(ids) != manifest["rows"]["done"]:
        raise InputError(
            f"{path}: {len(ids)} ids, vectors of shape {vectors.shape} and {manifest['rows']['done']} rows in the "
            "manifest do not fit; delete the folder and extract again"
        )
    return FeatureTable(path, manifest["key"], ids, vectors, manifest)


def write_table(
    path: Path, ids: Sequence[str], keys: pa.Array, vectors: VectorStore, manifest: Mapping[str, Any]
) -> FeatureTable:
    """Align vectors with ids in one .npy and publish the folder, manifest last.

    keys: input key of each id [N]; several ids may share one. If another process published the same table first, that
    one stays. Memory: one shard and the keys.
    """
    with store_errors(path.parent), whole_folder(path) as partial:
        _write_vectors(partial / "vectors.npy", keys, vectors)
        pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), partial / "ids.parquet")
        write_json(partial / "manifest.json", manifest)
    return open_table(path, manifest["key"])


def _write_vectors(path: Path, keys: pa.Array, store: VectorStore) -> None:
    """Copy each key's vector to its rows of a new .npy [N, F]. The caller has checked that every key is in a shard."""
    unique = keys.unique()
    unique_N = pc.index_in(keys, value_set=unique).to_numpy()  # row of the table -> its unique key
    out: np.memmap[Any, np.dtype[Any]] | None = None
    filled_N = np.zeros(len(keys), bool)
    for shard in store.shards():
        vectors = shard_vectors(shard)
        if out is None:
            out = mapped_array(path, vectors.dtype, (len(keys), vectors.shape[1]))
        wanted = pc.index_in(
            shard["key"], value_set=unique
        ).combine_chunks()  # row of the shard -> its unique key, or null
        shard_row = np.full(len(unique), -1, np.int64)  # unique key -> row of this shard
        shard_row[wanted.drop_null().to_numpy()] = np.flatnonzero(wanted.is_valid().to_numpy(zero_copy_only=False))
        source_N = shard_row[unique_N]
        out[source_N >= 0] = vectors[source_N[source_N >= 0]]
        filled_N |= source_N >= 0
    assert out is not None
    assert filled_N.all()
    out.flush()
