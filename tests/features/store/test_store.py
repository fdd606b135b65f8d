"""Row keys, shards and tables on disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.encoders.inputs import EncoderInput, input_key
from features.errors import InputError
from features.store.folders import atomic_file, save_torch
from features.store.shards import KEY_BYTES, KEY_TYPE, VectorStore
from features.store.tables import FeatureTable, digest, open_table, write_table

ENCODER = "e" * 64
KEYS = [bytes([i]) * KEY_BYTES for i in range(6)]
VECTORS = np.arange(24, dtype=np.float16).reshape(6, 4)
TOKENS = np.arange(6, dtype=np.int32)

texts = st.lists(st.text(max_size=4), min_size=1, max_size=3).map(tuple)
rows = st.builds(EncoderInput, texts=texts, image=st.none() | st.text(max_size=3))


@given(rows, rows)
def test_row_keys_are_equal_exactly_for_equal_rows(a: EncoderInput, b: EncoderInput) -> None:
    assert (input_key(a) == input_key(b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (EncoderInput(texts=("ab",)), EncoderInput(texts=("a", "b"))),
        (EncoderInput(texts=("a", "b")), EncoderInput(texts=("b", "a"))),
        (EncoderInput(texts=("a",)), EncoderInput(texts=("a",), image="None")),
        (EncoderInput(texts=("1\na",)), EncoderInput(texts=("", "a"))),
    ],
)
def test_rows_that_look_alike_have_other_keys(a: EncoderInput, b: EncoderInput) -> None:
    assert len(input_key(a)) == KEY_BYTES
    assert input_key(a) != input_key(b)


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def shards_of(store: Path) -> VectorStore:
    shards = VectorStore.open(store, ENCODER)
    shards.write(KEYS[:4], VECTORS[:4], TOKENS[:4])
    shards.write(KEYS[4:], VECTORS[4:], TOKENS[4:])
    return shards


def manifest(done: int, failed: tuple[dict[str, str], ...] = (), key: str = "k" * 64) -> dict[str, object]:
    return {"key": key, "encoder": {"model": "tiny"}, "rows": {"done": done, "failed": list(failed)}}


def table_of(store: Path) -> FeatureTable:
    keys = pa.array(
        [KEYS[5], KEYS[0], KEYS[5], KEYS[2]], KEY_TYPE
    )  # two ids share a row; some rows are another table's
    failed = ({"id": "x", "reason": "no review text"},)
    return write_table(store / "features" / "t", ["a", "b", "c", "d"], keys, shards_of(store), manifest(4, failed))


def test_shards_come_back_by_key_and_writing_one_twice_changes_nothing(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)
    assert shards.index() == dict(zip(KEYS, range(6), strict=True))
    before = {path: path.read_bytes() for path in shards.folder.iterdir()}
    shards_of(tmp_path)
    assert {path: path.read_bytes() for path in shards.folder.iterdir()} == before
    assert len(before) == 2


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    assert VectorStore.open(tmp_path, ENCODER).index() == {}


def test_a_shard_of_another_encoder_is_refused(tmp_path: Path) -> None:
    shards_of(tmp_path)
    impostor = VectorStore(VectorStore.open(tmp_path, ENCODER).folder, "f" * 64)
    with pytest.raises(
        InputError, match=r"\.arrow: written by another encoder \(key eeeeeeeeeeee, expected ffffffffffff"
    ):
        impostor.index()


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)
    path = sorted(shards.folder.iterdir())[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"{path.name}: not a readable shard \(.*\); delete it and extract again"):
        shards.index()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    shards = VectorStore.open(tmp_path, ENCODER)
    with pytest.raises(InputError, match=r"^store .*: cannot be written \(No space left on device\); free space"):
        shards.write(KEYS, VECTORS, TOKENS)
    assert list(shards.folder.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_a_neighbours_file_is_not(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)
    old, new = shards.folder / ".a.1-1.tmp", shards.folder / ".b.2-2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    shards.clean()
    assert (old.exists(), new.exists()) == (False, True)
    assert len(shards.index()) == 6


def test_a_table_is_aligned_mapped_and_read_only(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    assert isinstance(table.vectors, np.memmap)
    assert table.vectors.dtype == np.float16
    assert table.vectors.ctypes.data % 64 == 0
    np.testing.assert_array_equal(table.vectors, VECTORS[[5, 0, 5, 2]])
    assert table.rows(["d", "a", "a"]).tolist() == [3, 0, 0]
    assert table.rows([]).tolist() == []
    with pytest.raises(ValueError, match="read-only"):
        table.vectors[0, 0] = 1


def test_ids_without_a_vector_are_named_with_their_reason(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    with pytest.raises(InputError, match=r"no vector for 2 of 3 ids, the first is 'x' \(no review text\)"):
        table.rows(["a", "x", "y"])
    with pytest.raises(InputError, match=r"no vector for 1 of 1 ids, the first is 'y' \(not in the domain\)"):
        table.rows(["y"])


def test_a_table_travels_as_its_path(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert (received.ids, received.key) == (table.ids, table.key)
    np.testing.assert_array_equal(received.vectors, table.vectors)


def test_a_table_that_is_already_there_stays(tmp_path: Path) -> None:
    first = table_of(tmp_path)
    stamp = (first.path / "vectors.npy").stat().st_mtime_ns
    assert table_of(tmp_path).ids == first.ids
    assert (first.path / "vectors.npy").stat().st_mtime_ns == stamp
    assert [path.name for path in first.path.parent.iterdir()] == ["t"]


def test_unfinished_broken_and_foreign_tables_are_refused(tmp_path: Path) -> None:
    path = table_of(tmp_path).path
    with pytest.raises(
        InputError, match=r"written by another encoder or from other rows \(encoder tiny, key kkkkkkkkkkkk, e"
    ):
        open_table(path, "f" * 64)
    (path / "manifest.json").write_text(json.dumps(manifest(3)))
    with pytest.raises(InputError, match=r"4 ids, vectors of shape \(4, 4\) and 3 rows in the manifest do not fit"):
        open_table(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="broken feature table"):
        open_table(path)
    (path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no finished feature table \(manifest.json is missing\); extract it"):
        open_table(path)


# --- one file in one step -----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    with atomic_file(path, durable=True) as beside:
        beside.write_bytes(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with pytest.raises(TypeError, match="bytes-like"), atomic_file(path) as beside:
        beside.write_bytes("half-way")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path], "nothing unfinished is left"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    with atomic_file(path) as mine, ThreadPoolExecutor(1) as pool:
        mine.write_bytes(b"mine")
        assert pool.submit(write_file, path, b"theirs").result() != mine
        assert path.read_bytes() == b"theirs"
    assert path.read_bytes() == b"mine"


def write_file(path: Path, content: bytes) -> Path:
    with atomic_file(path) as beside:
        beside.write_bytes(content)
    return beside


def test_a_write_of_torch_that_comes_up_short_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself says RuntimeError."""
    torch = pytest.importorskip("torch")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_torch({"weights": torch.zeros(100_000)}, tmp_path / "full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "full"))
    with pytest.raises(RuntimeError, match="Parent directory"):
        save_torch({}, tmp_path / "nowhere" / "file")
    save_torch({"weights": torch.ones(2)}, tmp_path / "whole")
    assert torch.load(tmp_path / "whole")["weights"].tolist() == [1, 1]
