"""Shards: what was computed for content keys, a file for each macro-batch of work, never changed.

    <store>/vectors/<encoder key[:12]>/<shard>.arrow     vectors by input key
    <store>/.seen-<random>                               by which workers know that they see this store

A vector depends on nothing but the encoder and its input, so all domains, filters and plans share one set of shards per
encoder: a changed domain encodes its changed inputs only. A shard appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.errors import InputError, one_line
from features.store.folders import UNFINISHED, atomic_file, store_errors

KEY_BYTES = 16  # 128 bits of SHA-256: a collision among a million keys has probability 1e-27
KEY_TYPE = pa.binary(KEY_BYTES)
_MARK = ".seen-"
_STALE_SECONDS = 3600.0  # an unfinished file older than this belongs to a killed run, not to a running neighbour


def write_shard(folder: Path, table: pa.Table, maker: str, maker_key: str) -> Path:
    """Write one shard atomically. table: a column `key` (KEY_TYPE), and whatever was computed for each key.

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
    """Return the file name of the shard that holds these keys and no others."""
    return f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.arrow"


def read_shards(folder: Path, maker: str, maker_key: str) -> Iterator[pa.Table]:
    """Yield each shard, memory-mapped, in name order. Raises InputError for one of another maker or a broken one."""
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


def clean_shards(folder: Path) -> None:
    """Remove the unfinished files that killed runs left."""
    for path in folder.glob(f".*{UNFINISHED}"):
        with suppress(FileNotFoundError):  # its owner has just renamed it
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def mark_store(store: Path) -> Path:
    """Return a file in `store` by which workers know that they see this folder, and not one of its name on their own disk.

    Its name is random, and it stays: two runs that start together may each make one, and either is as good.
    """
    with store_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        if marks := sorted(store.glob(f"{_MARK}*")):
            return marks[0]
        mark = store / f"{_MARK}{uuid.uuid4().hex}"
        mark.touch()
        return mark


def check_mark(mark: Path) -> None:
    """Raise InputError on a node that does not see the store: what it wrote would be lost on a disk of its own."""
    if not mark.exists():
        raise InputError(
            f"store {mark.parent}: node {socket.gethostname()} does not see it; put the home folder where all nodes do, or "
            "extract on one machine, without --address"
        )


@dataclass(frozen=True)
class VectorStore:
    """All vectors that one encoder ever computed, by input key. Cheap to send to a worker: it holds a path and a key."""

    folder: Path
    encoder_key: str

    @classmethod
    def open(cls, store: Path, encoder_key: str) -> VectorStore:
        """Return the vectors of one encoder in a feature store; nothing is read."""
        return cls(store / "vectors" / encoder_key[:12], encoder_key)

    def write(self, keys: Sequence[bytes], vectors: NDArray[np.floating[Any]], tokens: NDArray[np.int32]) -> Path:
        """Write one shard atomically: vectors [N, F], tokens [N] (real tokens read for each input)."""
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
        """Yield each shard, memory-mapped, in name order. Raises InputError as `read_shards` does."""
        return read_shards(self.folder, "encoder", self.encoder_key)

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Return whether there is a shard of exactly these inputs."""
        return (self.folder / shard_name(keys)).exists()

    def check_writable(self) -> None:
        """Raise InputError where no shard could be written: before hours of work, not after."""
        with store_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder):
                pass

    def index(self) -> dict[bytes, int]:
        """Return input key -> real tokens for all vectors that are stored (a hundred bytes each; no vector is read)."""
        tokens: dict[bytes, int] = {}
        for shard in self.shards():
            tokens.update(zip(shard["key"].to_pylist(), shard["tokens"].to_pylist(), strict=True))
        return tokens

    def clean(self) -> None:
        """Remove the unfinished files that killed runs left."""
        clean_shards(self.folder)


def shard_vectors(shard: pa.Table) -> NDArray[np.floating[Any]]:
    """Return the vectors [N, F] of one shard of a `VectorStore`."""
    width = shard.schema.field("vector").type.list_size
    vectors: NDArray[np.floating[Any]] = shard["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    return vectors
