"""What extraction does when disks are full or closed, when others do the same work, and when actors and nodes die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from features.encoders.batches import Encoded
from features.encoders.encoder import load_encoder
from features.encoders.inputs import EncoderInput, input_key
from features.encoders.spec import EncoderSpec, ResolvedEncoder, resolve_encoder
from features.errors import InputError
from features.extraction.spec import FeatureSpec, find_table
from features.extraction.workers import Actors, WorkTotals, _Actor, _Tries, block_result, run_blocks
from features.pseudo.generation_cache import GenerationWorker
from features.store.folders import mapped_array
from features.store.shards import VectorStore
from tests.features.one_table import extract

from ...patience import PATIENCE_S

ROOT = Path(__file__).parents[3]


def spec_of(folder: Path) -> FeatureSpec:
    encoder = EncoderSpec(model=str(folder), max_tokens=32, dtype="float32", store_dtype="float32")
    return FeatureSpec(kind="users", encoder=encoder)


def reviews(users: int) -> list[tuple[str, str, str]]:
    return [(f"u{u:04d}", f"i{i}", f"w{u % 90} w{u // 90} w{i}") for u in range(users) for i in range(6)]


def bytes_of(table: Any) -> list[bytes]:
    return [(table.path / name).read_bytes() for name in ("vectors.npy", "ids.parquet")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_what_is_finished_is_kept(tiny_bert, make_domain, tmp_path, small_disk) -> None:
    domain, spec = make_domain(reviews(600)), spec_of(tiny_bert)  # 16 shards of 8 KiB, then a table of 75
    with pytest.raises(InputError, match=r"^store .*: cannot be written \(No space left on device\); free") as caught:
        extract(spec, domain, small_disk, workers=1)
    assert "\n" not in str(caught.value)
    assert find_table(spec, domain, small_disk) is None
    assert not list(small_disk.rglob(".*.tmp"))
    kept = VectorStore.open(small_disk, resolve_encoder(spec.encoder).key).index()
    assert len(kept) > 100
    shutil.copytree(small_disk / "vectors", tmp_path / "large" / "vectors")
    seen: list[EncoderInput] = []
    resumed = extract(spec, domain, tmp_path / "large", loader=counting(seen))
    assert len(seen) == 600 - len(kept)
    assert bytes_of(resumed) == bytes_of(extract(spec, domain, tmp_path / "whole"))


def test_an_array_that_the_disk_has_no_room_for_is_an_error_and_no_signal(small_disk: Path) -> None:
    mapped_array(small_disk / "fits.npy", np.float32, (100, 100)).fill(1)
    assert np.load(small_disk / "fits.npy").sum() == 10_000
    with pytest.raises(OSError, match="No space left on device"):
        mapped_array(small_disk / "too-large.npy", np.float32, (200, 200))
    assert mapped_array(small_disk / "none.npy", np.float32, (0, 100)).shape == (0, 100)


def counting(seen: list[EncoderInput]) -> Callable[[ResolvedEncoder], Any]:
    class Counting:
        def __init__(self, resolved: ResolvedEncoder) -> None:
            self.encoder = load_encoder(resolved)

        def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
            seen.extend(rows)
            return self.encoder.encode(rows)

    return Counting


def test_a_table_that_does_not_fit_is_no_crash(tiny_bert, make_domain, tmp_path, monkeypatch) -> None:
    """A write into a mapped file on a full disk would be a bus error; the space is asked for first."""

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    domain, spec = make_domain(reviews(40)), spec_of(tiny_bert)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(InputError, match=r"store .*features: cannot be written \(No space left on device\)"):
            extract(spec, domain, tmp_path / "store")
    assert list((tmp_path / "store" / "features").iterdir()) == []
    seen: list[EncoderInput] = []
    extract(spec, domain, tmp_path / "store", loader=counting(seen))
    assert seen == []


def test_a_store_that_cannot_be_written_is_told_before_any_model_is_loaded(tiny_bert, make_domain, tmp_path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "vectors").write_text("a file where a folder should be")
    with pytest.raises(
        InputError, match=r"^store .*: cannot be written \(Not a directory\); free space, allow writing"
    ):
        extract(spec_of(tiny_bert), make_domain(reviews(2)), tmp_path / "store", loader=lambda _: pytest.fail("loaded"))


def test_a_node_that_does_not_see_the_store_says_so_before_any_work(
    tiny_bert, make_domain, tmp_path, monkeypatch
) -> None:
    message = r"^store \S+: node \S+ does not see it; put the home folder where all nodes do, or extract on one machine"
    domain, spec, store = make_domain(reviews(2)), spec_of(tiny_bert), tmp_path / "store"
    marks: list[list[Path]] = []
    for _ in range(2):
        shutil.rmtree(store / "features", ignore_errors=True)
        extract(spec, domain, store)
        marks.append(list(store.glob(".seen-*")))
    assert marks[0] == marks[1]
    assert len(marks[0]) == 1
    away = tmp_path / "away"  # a folder of the same name on a node's own disk
    monkeypatch.setattr("features.extraction.extract.mark_store", lambda store: away / marks[0][0].name)
    with pytest.raises(InputError, match=message):
        extract(spec, make_domain(reviews(3)), store, loader=lambda _: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        GenerationWorker(lambda: pytest.fail("loaded"), away, "key", 1, away / marks[0][0].name)


def actor_without_ray(monkeypatch: pytest.MonkeyPatch, worker: Callable[[Any], Any], *blocks: Any) -> _Actor:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    begun = _Tries()
    return _Actor(lambda: worker, blocks, SimpleNamespace(begin=SimpleNamespace(remote=begun.begin)))


def test_an_actor_whose_device_is_broken_ends_its_process(monkeypatch, capsys) -> None:
    def broken(block: pa.Table) -> pa.Table:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    actor_without_ray(monkeypatch, broken, pa.table({"key": [b"k"]}))(pa.table({"item": [0]}))
    assert ends == [1]
    assert "an illegal memory access was encountered" in capsys.readouterr().err


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from features.errors import InputError
    from features.store.shards import VectorStore
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        VectorStore.open(Path(sys.argv[1]), "e" * 64).check_writable()
    except InputError as error:
        print(error)
"""


def test_a_read_only_store(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # pytest's own folders are closed to others
    store = tmp_path / "store"
    (store / "vectors").mkdir(parents=True)
    (store / "vectors").chmod(0o555)
    command = [sys.executable, "-c", textwrap.dedent(READ_ONLY), str(store)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "cannot be written (Permission denied); free space, allow writing, or name another folder" in done.stdout


TOGETHER = """
    import sys, time
    from pathlib import Path
    from features.domains.domain import open_domain
    from features.encoders.spec import EncoderSpec
    from features.extraction.extract import extract_tables
    from features.extraction.spec import FeatureSpec
    folder, domain, store, ready, other = sys.argv[1:]
    Path(ready).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    encoder = EncoderSpec(model=folder, max_tokens=32, dtype="float32", store_dtype="float32")
    wanted = [(FeatureSpec(kind="users", encoder=encoder), open_domain(Path(domain)))]
    (table,) = extract_tables(wanted, Path(store), workers=1)
    print(table.key)
"""


def test_two_extractions_of_one_table_at_once_both_end_with_the_same_one(tiny_bert, make_domain, tmp_path) -> None:
    domain, spec, store = make_domain(reviews(400)), spec_of(tiny_bert), tmp_path / "store"
    flags = [str(tmp_path / "one"), str(tmp_path / "two")]
    words = [sys.executable, "-c", textwrap.dedent(TOGETHER), str(tiny_bert), str(domain.path), str(store)]
    pair = [
        subprocess.Popen([*words, *flags[::step]], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for step in (1, -1)
    ]
    said = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert said[0][0] == said[1][0]
    table = find_table(spec, domain, store)
    assert table is not None
    assert [path.name for path in (store / "features").iterdir()] == [table.path.name]
    assert bytes_of(table) == bytes_of(extract(spec, domain, tmp_path / "whole"))


# --- through Ray --------------------------------------------------------------------------------------------------


class Slow:
    """The real encoder, slowly, writing down which process encodes what."""

    def __init__(self, resolved: ResolvedEncoder, log: Path) -> None:
        self.encoder, self.log = load_encoder(resolved), log

    def encode(self, rows: Sequence[EncoderInput]) -> Encoded:
        lines = "".join(f"{os.getpid()} {os.environ.get('NODE', '')} {input_key(row).hex()}\n" for row in rows)
        with self.log.open("a") as file:
            file.write(lines)
        time.sleep(0.4)
        return self.encoder.encode(rows)


def slowly(log: Path) -> Callable[[ResolvedEncoder], Slow]:
    return lambda resolved: Slow(resolved, log)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_killed_actor_and_a_lost_node_cost_a_macro_batch_each(tiny_bert, make_domain, tmp_path, monkeypatch) -> None:
    """Two workers on logical GPUs of two raylets; one is killed with -9, then the other's node is taken away."""
    import ray
    from ray.cluster_utils import Cluster

    domain, spec, log = make_domain(reviews(1800)), spec_of(tiny_bert), tmp_path / "log"  # 16 blocks of 112 or 113 rows
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"NODE": str(n)}) for n in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        made: list[Any] = []
        work = threading.Thread(
            target=lambda: made.append(extract(spec, domain, tmp_path / "store", use_ray=True, loader=slowly(log)))
        )
        work.start()
        pid, node = wait_for(log, lambda lines: len({line[0] for line in lines}) == 2)[0][:2]
        os.kill(int(pid), signal.SIGKILL)
        wait_for(log, lambda lines: len({line[0] for line in lines}) == 3)
        cluster.remove_node(nodes[1 - int(node)], allow_graceful=False)
        work.join(180)
        assert made, "not finished"
    finally:
        ray.shutdown()
        cluster.shutdown()
    again = sum(count - 1 for count in Counter(line[2] for line in read(log)).values())
    assert again <= 2 * 113
    key = resolve_encoder(spec.encoder).key
    rows = [key for shard in VectorStore.open(tmp_path / "store", key).shards() for key in shard["key"].to_pylist()]
    assert len(rows) == len(set(rows)) > 0
    whole = extract(spec, domain, tmp_path / "whole", use_ray=False)
    np.testing.assert_array_equal(made[0].vectors, whole.vectors)
    assert bytes_of(made[0]) == bytes_of(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_cluster_that_begins_empty_is_used_as_it_grows(tiny_bert, make_domain, tmp_path, monkeypatch) -> None:
    """A head without cores; three workers are wanted, and two nodes come while they are."""
    import ray
    from ray.cluster_utils import Cluster

    domain, spec, log = make_domain(reviews(900)), spec_of(tiny_bert), tmp_path / "log"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        made: list[Any] = []
        means: dict[str, Any] = {"workers": Actors(3, on_gpu=True), "use_ray": True, "loader": slowly(log)}
        work = threading.Thread(target=lambda: made.append(extract(spec, domain, tmp_path / "store", **means)))
        work.start()
        for n in range(2):
            time.sleep(2)  # so that the work has begun without it
            cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"NODE": f"n{n}"})
            wait_for(log, lambda lines: len({line[1] for line in lines}) == n + 1)  # noqa: B023
        work.join(180)
        assert made, "not finished"
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert {line[1] for line in read(log)} == {"n0", "n1"}
    assert bytes_of(made[0]) == bytes_of(extract(spec, domain, tmp_path / "whole", use_ray=False))


class Deadly:
    """A worker whose process ends at one macro-batch."""

    def __call__(self, block: pa.Table) -> pa.Table:
        if block["texts"].to_pylist() == ["deadly"]:
            os._exit(7)
        return block_result(figures={"texts": 1})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_macro_batch_that_ends_every_worker_ends_the_extraction() -> None:
    blocks = [pa.table({"texts": [text]}) for text in ("one", "deadly", "two")]
    told: list[tuple[int, ...]] = []
    with pytest.raises(InputError, match=r"^4 workers died at the same macro-batch, the last on .* the logs there say"):
        run_blocks(blocks, Deadly, 3, name="D", workers=1, use_ray=True, progress=lambda *call: told.append(call))
    assert told[-1][0] >= 1, "others are done meanwhile"


def test_a_macro_batch_that_was_begun_too_often_is_begun_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one above, without processes that die."""
    actor = actor_without_ray(monkeypatch, lambda block: block, "block 0", "block 1")
    assert [actor(pa.table({"item": [1]})) for _ in range(4)] == ["block 1"] * 4
    (reason,) = actor(pa.table({"item": [1]}))["refused"].to_pylist()
    assert reason.startswith("4 workers died at the same macro-batch, the last on ")
    assert actor(pa.table({"item": [0]})) == "block 0", "each is counted apart"


def test_texts_are_held_until_they_are_done_and_once() -> None:
    blocks = [pa.table({"texts": [str(n)]}) for n in range(5)]
    alive = [weakref.ref(block) for block in blocks]

    def work(block: pa.Table) -> pa.Table:
        return block_result(figures={"texts": 1})

    done = run_blocks(blocks, lambda: work, 5, name="W", workers=1, use_ray=False, progress=None)
    assert (done.texts, [block() for block in alive]) == (5, [None] * 5)


def test_time_is_counted_from_when_the_first_worker_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers begin 100 s after the driver; the first answer is of the one that began later."""
    clock = iter([130.0, 140.0, 160.0])
    monkeypatch.setattr("features.extraction.workers.time", SimpleNamespace(monotonic=lambda: next(clock)))
    done, elapsed = WorkTotals(), []
    for seconds in (20.0, 40.0, 30.0):
        (answer,) = block_result(figures={"texts": 5, "seconds": seconds}).to_pylist()
        done.add(answer)
        elapsed.append(done.elapsed)
    assert elapsed == [20.0, 40.0, 60.0]


def read(log: Path) -> list[list[str]]:
    return [line.split(" ") for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(log: Path, condition: Callable[[list[list[str]]], bool]) -> list[list[str]]:
    deadline = time.monotonic() + PATIENCE_S
    while not condition(read(log)):
        assert time.monotonic() < deadline, read(log)[-1:]
        time.sleep(0.05)
    return read(log)


@pytest.mark.slow
def test_a_killed_driver_of_ray_actors_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    """Two of the kill points of `tests/stress/kill_extract.py`."""
    command = [sys.executable, str(ROOT / "tests/stress/kill_extract.py"), "--kills", "2", "--ray", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(ray): 2 kills; table equal True, every row once True" in done.stdout
    assert "2 kills in 1 extractions: nothing lost, nothing twice, bits equal" in done.stdout
