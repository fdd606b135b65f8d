"""The content-addressed feature store: vectors by row content, and the aligned table that trials open.

    <store>/vectors/<encoder key[:12]>/<shard>.arrow     vectors by row key; a macro-batch a file, never changed
    <store>/features/<domain>-<kind>-<key[:12]>/         ids.parquet, vectors.npy [N, F], manifest.json
    <store>/.seen-<drawn>                                by which workers know that they see this store

A row's vector depends on nothing but the encoder and the row, so all domains, filters and plans share one set of shards
per encoder: a changed domain encodes its changed rows only, and an unchanged row is never encoded again. Shards and
tables appear whole or not at all: each is written under another name in the same folder, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.errors import InputError, one_line
from features.extraction.prompts import Row
from features.store.folders import UNFINISHED, atomic_file, mapped_array, store_errors, whole_folder, write_json

KEY_BYTES = 16  # 128 bits of SHA-256: a collision among a million rows has probability 1e-27
KEY_TYPE = pa.binary(KEY_BYTES)
_MARK = ".seen-"
_STALE_SECONDS = 3600.0  # a temporary file older than this belongs to a killed run, not to a neighbour's


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document, independent of key order."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def row_key(row: Row) -> bytes:
    """Content key of a row, KEY_BYTES long. Lengths go in too, so ("ab",) and ("a", "b") differ."""
    sha = hashlib.sha256(f"{len(row.texts)} {row.image!r}\n".encode())
    for text in row.texts:
        data = text.encode()
        sha.update(b"%d\n" % len(data))
        sha.update(data)
    return sha.digest()[:KEY_BYTES]


def write_shard(folder: Path, table: pa.Table, maker: str, maker_key: str) -> Path:
    """Write one shard atomically. table: a column `key` (KEY_TYPE), and whatever was made for each key.

    maker: "encoder" or "generator". The shard's name is the hash of its keys: the same work done twice is one file.
    """
    table = table.replace_schema_metadata({f"{maker}_key": maker_key})
    path = folder / shard_name(table["key"].to_pylist())
    with store_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=True) as beside, pa.ipc.new_file(beside, table.schema) as writer:
            writer.write_table(table)
    return path


def shard_name(keys: Sequence[bytes]) -> str:
    """File name of the shard that holds these rows and no others."""
    return f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.arrow"


def read_shards(folder: Path, maker: str, maker_key: str) -> Iterator[pa.Table]:
    """Each shard, memory-mapped, in name order. Raises InputError for one of another maker or a broken one."""
    for path in sorted(folder.glob("*.arrow")):
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path}: not a readable shard ({one_line(error)}); delete it and extract again"
            ) from error
        owner = (table.schema.metadata or {}).get(f"{maker}_key".encode(), b"?").decode()
        if owner != maker_key:
            raise InputError(
                f"{path}: written by another {maker} (key {owner[:12]}, expected {maker_key[:12]}); "
                "give this study a store folder of its own, or delete that shard"
            )
        yield table


def mark_store(store: Path) -> Path:
    """A file in `store` by which workers know that they see this one, and not a folder of its name on their own disk.

    Its name is drawn, and it stays: runs that meet may draw two, and each is as good as the other.
    """
    with store_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        if marks := sorted(store.glob(f"{_MARK}*")):
            return marks[0]
        mark = store / f"{_MARK}{uuid.uuid4().hex}"
        mark.touch()
        return mark


def check_mark(mark: Path) -> None:
    """Raises InputError on a node that does not see the store: what it wrote would be lost on a disk of its own."""
    if not mark.exists():
        raise InputError(
            f"store {mark.parent}: node {socket.gethostname()} does not see it; put the home folder where all nodes do, or "
            "extract on one machine, without --address"
        )


def clean_shards(folder: Path) -> None:
    """Remove what killed runs left under temporary names."""
    for path in folder.glob(f".*{UNFINISHED}"):
        with suppress(FileNotFoundError):  # its owner has just renamed it
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class RowStore:
    """All vectors that one encoder ever made, by row key. Cheap to send to a worker: it holds a path and a key."""

    folder: Path
    encoder_key: str

    @classmethod
    def of(cls, store: Path, encoder_key: str) -> RowStore:
        return cls(store / "vectors" / encoder_key[:12], encoder_key)

    def write(self, keys: Sequence[bytes], vectors: NDArray[np.floating[Any]], tokens: NDArray[np.int32]) -> Path:
        """Write one shard atomically: vectors [N, F], tokens [N] (real tokens read per row).

        The shard's name is the hash of its row keys: the same macro-batch computed twice is one file.
        """
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        table = pa.table(
            {
                "key": pa.array(keys, KEY_TYPE),
                "tokens": pa.array(tokens, pa.int32()),
                "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            }
        )
        return write_shard(self.folder, table, "encoder", self.encoder_key)

    def shards(self) -> Iterator[pa.Table]:
        """Each shard, memory-mapped, in name order. Raises InputError for one of another encoder or a broken one."""
        return read_shards(self.folder, "encoder", self.encoder_key)

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Whether there is a shard of exactly these rows."""
        return (self.folder / shard_name(keys)).exists()

    def check_writable(self) -> None:
        """Raises InputError where no shard could be written: before hours of work, not after."""
        with store_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder):
                pass

    def index(self) -> dict[bytes, int]:
        """Row key -> real tokens, for all rows that are done (a hundred bytes each; no vector is read)."""
        done: dict[bytes, int] = {}
        for shard in self.shards():
            done.update(zip(shard["key"].to_pylist(), shard["tokens"].to_pylist(), strict=True))
        return done

    def clean(self) -> None:
        """Remove what killed runs left under temporary names."""
        clean_shards(self.folder)


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Vectors of the users or items of one domain, memory-mapped and read-only: trials share one copy of the pages.

    ids: sorted; ids[i] owns vectors[i]. vectors: [N, F], float16 or float32. Rows that failed are absent and listed in
    manifest["rows"]["failed"]. Pickled as its path, so sending one to a worker copies nothing.
    """

    path: Path
    key: str
    ids: list[str]
    vectors: np.memmap[Any, np.dtype[Any]]
    manifest: Mapping[str, Any]

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Row number of each id [len(ids)]. Raises InputError for ids that have no vector, naming the first."""
        rows = self._index.get_indexer(pd.Index(ids, dtype=object)).astype(np.int64)
        if (unknown := np.flatnonzero(rows < 0)).size:
            name = ids[int(unknown[0])]
            reason = next(
                (f["reason"] for f in self.manifest["rows"]["failed"] if f["id"] == name), "not in the domain"
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
    """Folder of the feature table of one domain and kind."""
    return store / "features" / f"{domain}-{kind}-{key[:12]}"


def open_table(path: Path, key: str | None = None) -> FeatureTable:
    """Open a finished table; `key`, where given, must be its own.

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
    path: Path, ids: Sequence[str], keys: pa.Array, shards: RowStore, manifest: Mapping[str, Any]
) -> FeatureTable:
    """Align vectors with ids into one .npy and publish the folder, manifest last.

    keys: row key of each id [N]; several ids may share one. If another process published the same table first, theirs
    stays. Memory: one shard and the keys.
    """
    with store_errors(path.parent), whole_folder(path) as partial:
        _write_vectors(partial / "vectors.npy", keys, shards)
        pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), partial / "ids.parquet")
        write_json(partial / "manifest.json", manifest)
    return open_table(path, manifest["key"])


def _write_vectors(path: Path, keys: pa.Array, shards: RowStore) -> None:
    """Copy each key's vector to its rows of a new .npy [N, F]. The caller has checked that every key is in a shard."""
    unique = keys.unique()
    unique_of = pc.index_in(keys, value_set=unique).to_numpy()  # [N] -> unique key
    out: np.memmap[Any, np.dtype[Any]] | None = None
    filled = np.zeros(len(keys), bool)
    for shard in shards.shards():
        width = shard.schema.field("vector").type.list_size
        vectors = shard["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
        if out is None:
            out = mapped_array(path, vectors.dtype, (len(keys), width))
        found = pc.index_in(shard["key"], value_set=unique).combine_chunks()
        here = np.full(len(unique), -1, np.int64)  # unique key -> row of this shard
        here[found.drop_null().to_numpy()] = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
        source = here[unique_of]
        out[source >= 0] = vectors[source[source >= 0]]
        filled |= source >= 0
    assert out is not None
    assert filled.all()
    out.flush()
