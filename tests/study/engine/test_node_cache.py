"""Tasks on nodes that do not see the home folder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from features.store.tables import FeatureTable
from study.data.pretrain import prepare_one
from study.engine import node_cache
from study.engine.checkpoints import CheckpointWriter
from study.engine.node_cache import TaskServer, cached, locate, pack
from study.engine.worker import Outbox, TrialFolders, run_trial
from study.tracking import tags
from study.tracking.runs import connect, default_uri, find_runs
from tests.trainables.sequence_worlds import make_sequence_task
from tests.trainables.worlds import SPLIT, domains_of, make_world, text_vectors
from trainables.models.lgcd import pretraining
from trainables.tasks.arrays import TaskFolders, find_vectors
from trainables.tasks.rating import load_held_out, load_task
from trainables.tasks.rating_build import build_task
from trainables.trial import kept_at

from ...patience import PATIENCE_S
from .. import tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TaskFolders, FeatureTable]:
    """A task whose vectors are in feature tables elsewhere, and one of these; both sent to this node, then gone at home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, target = domains_of(make_world(), tmp_path)
    vectors = text_vectors(source, target, tmp_path)
    folders = build_task(SPLIT, source, target, vectors, tmp_path / "home" / "tasks")
    for folder in (folders.task_dir, folders.test_dir):
        node_cache._unpack(pack(folder), folder)
    folders.task_dir.parent.rename(away(folders))
    return folders, vectors.items


def away(folders: TaskFolders) -> Path:
    return folders.task_dir.parent.with_name("away")


def test_what_is_sent_opens_as_at_home(sent: tuple[TaskFolders, FeatureTable], tmp_path: Path) -> None:
    folders, table = sent
    here = cached(folders.task_dir)
    assert str(here) == f"{tmp_path}/cache/study/sent{folders.task_dir}"
    task = load_task(here)
    items = [str(name) for name in np.load(here / "item_id.npy")]
    raw = torch.from_numpy(table.vectors[table.rows(items)].astype(np.float32))
    ours = task.items[torch.arange(len(items))] * task.items.scale + task.items.centre
    torch.testing.assert_close(ours, raw, atol=1e-5, rtol=1e-5)
    assert find_vectors(here) == [cached(path) for path in find_vectors(away(folders) / "search")]
    assert len(load_held_out(cached(folders.test_dir)).ratings) > 0
    assert not list((tmp_path / "cache").rglob(".*.npy*")), "nothing half-written"


def test_test_data_goes_only_where_it_is_asked_for(sent: tuple[TaskFolders, FeatureTable]) -> None:
    folder = away(sent[0]) / "search"
    assert {path.parent for path in map(Path, pack(folder)) if path.is_relative_to(folder.parent)} == {
        folder, folder / "validation"
    }  # fmt: skip


def test_what_is_seen_is_opened_where_it_is(tmp_path: Path) -> None:
    assert locate(tmp_path, server=None) == tmp_path
    assert locate(tmp_path, server="never asked") == tmp_path
    assert locate(tmp_path / "gone", server=None) == tmp_path / "gone"


@pytest.mark.parametrize("linked", ["home", "store"])
def test_a_link_on_the_way_to_the_vectors_is_no_hindrance(
    linked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder behind one; and a store that was moved to another disk after the task was built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "deep" / "disk").mkdir(parents=True)
    home = tmp_path / "home"
    if linked == "home":
        home.symlink_to(tmp_path / "deep" / "disk")
    source, target = domains_of(make_world(), home)
    folders = build_task(SPLIT, source, target, text_vectors(source, target, home), home / "tasks")
    if linked == "store":
        (home / "store").rename(tmp_path / "deep" / "disk" / "store")
        (home / "store").symlink_to(tmp_path / "deep" / "disk" / "store")
    asked = folders.task_dir, home / "tasks" / folders.task_dir.parent.name / "search"
    for folder in dict.fromkeys(asked):  # as the link says it, and as it resolves
        node_cache._unpack(pack(folder), folder)
        task, there = load_task(cached(folder)), load_task(folder)
        torch.testing.assert_close(task.items[torch.arange(5)], there.items[torch.arange(5)], rtol=0, atol=0)


class Server:
    """A task server in this process. The home folder is away unless it is asked: `server.pack.remote(...)`."""

    def __init__(self, home: Path) -> None:
        self._home, self._server = home, TaskServer()
        self.asked: list[str] = []
        home.rename(home.with_name("away"))

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=partial(self._answer, name))

    def _answer(self, name: str, *given: Any) -> Any:
        self.asked.append(name)
        self._home.with_name("away").rename(self._home)
        try:
            return getattr(self._server, name)(*given)
        finally:
            self._home.rename(self._home.with_name("away"))


@pytest.fixture
def blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Path]:
    """The server of a home folder that is not seen here, and a task of sequences in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("get", "put"):
        monkeypatch.setattr(f"ray.{name}", lambda value: value)
    task_dir, _ = make_sequence_task(tmp_path / "home")
    return Server(tmp_path / "home"), task_dir


def test_what_trials_share_is_brought_home_and_sent_to_others(
    blind: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, task_dir = blind
    given = ("lgcd", {"encoder_epochs": 1}, task_dir, [0])
    prepare_one(server, *given)
    assert server.asked == ["pack", "pack", "keep"]
    (made,) = (tmp_path / "away" / "tasks" / "encoders").iterdir()
    copy = cached(task_dir.parent.parent / "encoders" / made.name)
    for name in ("manifest.json", "weights.pt"):
        assert (made / name).read_bytes() == (copy / name).read_bytes()

    monkeypatch.setattr(pretraining, "pretrain", None)  # would fail if it were called again
    for number, ask in enumerate(
        (lambda: prepare_one(server, *given), lambda: TrialFolders(payload_of(*given), server))
    ):
        server.asked.clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"node-{number}"))
        ask()
        assert server.asked == ["pack", "pack"]
        copy = cached(task_dir.parent.parent / "encoders" / made.name)
        assert (copy / "weights.pt").read_bytes() == (made / "weights.pt").read_bytes()


def payload_of(model: str, config: dict[str, Any], task_dir: Path, seeds: Sequence[int], **more: Any) -> dict[str, Any]:
    home = task_dir.parents[2]
    return {
        "trainable": "ending_trial:run", "model": model, "config": config, "task_dir": str(task_dir), "seeds": seeds,
        "test_dir": None, "rows": False, "metrics": ["val_rmse"], "threads": 1, "device": "cpu", "gpus": 0,
        "checkpoint": {"path": str(home / "checkpoints" / "a.pt"), "identity": "this", "seconds": 0}, **more,
    }  # fmt: skip


def test_a_kept_model_goes_home_and_leaves_the_node(blind: tuple[Server, Path], tmp_path: Path) -> None:
    server, task_dir = blind
    folders = TrialFolders(payload_of("lgcd", {}, task_dir, [0]), server)
    kept = kept_at("lgcd", {}, str(task_dir), [0])
    cached(kept).parent.mkdir()
    cached(kept).write_bytes(b"weights")
    folders.checkpoint.parent.mkdir()
    folders.checkpoint.write_bytes(b"state")
    folders.return_model()
    assert (tmp_path / "away" / kept.relative_to(tmp_path / "home")).read_bytes() == b"weights"
    folders.leave()
    assert (cached(kept).exists(), folders.checkpoint.exists()) == (False, False)


STAGED = """
from trainables.trial import Report

def run(model, config, task_dir, seeds, test_dir=None, rows=False, device="cpu", state=None):
    yield Report(epoch=1, metrics={"val_rmse": 1.0}, state=lambda: {"place": 1})
    if config["ends"] is not None:
        raise config["ends"]
    yield Report(epoch=1, metrics={"val_rmse": 1.0}, final=True)
"""


@pytest.mark.parametrize("ends", [None, ValueError("of the training"), SystemExit()], ids=repr)
def test_no_checkpoint_stays_on_the_node(
    ends: BaseException | None, blind: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that ends, one that raises, and one that Ray ends."""
    (tmp_path / "ending_trial.py").write_text(STAGED)
    monkeypatch.syspath_prepend(str(tmp_path))
    server, task_dir = blind
    offered, offer = [], CheckpointWriter.offer

    def spied(writer: CheckpointWriter, *given: Any) -> None:
        offer(writer, *given)
        offered.append(writer._path.is_file())

    monkeypatch.setattr(CheckpointWriter, "offer", spied)
    with contextlib.nullcontext() if ends is None else pytest.raises(type(ends)):
        run_trial(payload_of("", {"ends": ends}, task_dir, [0]), Outbox(lambda message: None), server)
    assert offered == [True]
    assert list((tmp_path / "cache").rglob("a.pt")) == []


def test_what_a_worker_made_is_kept_whole(tmp_path: Path) -> None:
    TaskServer().keep(str(tmp_path / "tasks" / "models" / "a.pt"), b"weights")
    assert [path.name for path in (tmp_path / "tasks" / "models").iterdir()] == ["a.pt"]
    assert (tmp_path / "tasks" / "models" / "a.pt").read_bytes() == b"weights"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"Not a directory: '{tmp_path}/file/a'"):
        TaskServer().keep(str(tmp_path / "file" / "a" / "b.pt"), b"weights")


BLIND = "mkdir -p {home} && mount -t tmpfs tmpfs {home} && exec {ray} start --address={address} --num-cpus=2 --block"


@contextmanager
def blind_node(address: str, home: Path, cache: Path) -> Iterator[None]:
    """A raylet of two CPUs that has an empty folder where the others have `home`."""
    ray = f"{sys.executable} -m ray.scripts.scripts"
    command = ["unshare", "--mount", "sh", "-c", BLIND.format(home=home, address=address, ray=ray)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    with (cache.parent / "node.txt").open("w") as out:
        node = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(PATIENCE_S)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_study_on_a_node_that_does_not_see_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search and scores of a study, equal to those of one machine, by workers for whom the home folder is empty."""
    import ray
    from ray.cluster_utils import Cluster

    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("a node of its own view needs root")
    ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = tiny.write_plan(tmp_path, drop=("sweeps", "ablate"), cold_ratios=[0.2])
    home, one, cache = tmp_path / "home", tmp_path / "one", tmp_path / "cache"
    cache.mkdir()
    for verb in ("search", "score"):
        command(verb, plan, "--home", one)
    command("extract", plan, "--home", home)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        with blind_node(cluster.address, home, cache):
            ray.init(address=cluster.address, log_to_driver=False)
            until = time.monotonic() + PATIENCE_S
            while sum(node["Alive"] for node in ray.nodes()) < 2:
                assert time.monotonic() < until, (tmp_path / "node.txt").read_text()
                time.sleep(0.5)
            said = [command(verb, plan, "--home", home, "--address", cluster.address) for verb in ("search", "score")]
        assert "registered as tiny.books-to-movies.0.2, version 1" in said[-1]
    finally:
        ray.shutdown()
        cluster.shutdown()
    tasks = sorted(path.name for path in cached_under(cache, home / "tasks").iterdir())
    assert len([name for name in tasks if name.startswith("books-movies-")]) == 1
    assert not list((cached_under(cache, home / "checkpoints")).rglob("*.pt"))
    (kept,) = (home / "tasks" / "models").iterdir()
    (other,) = (one / "tasks" / "models").iterdir()
    assert kept.name == other.name
    assert metrics_of(home) == metrics_of(one)
    assert len(metrics_of(home)) == 2 + 4


def command(*words: object) -> str:
    """What `study WORDS` says, in a process of its own: Ray does not take two clusters in one."""
    line = [sys.executable, "-m", "study", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cached_under(cache: Path, path: Path) -> Path:
    return cache / "study" / "sent" / path.relative_to(path.anchor)


def metrics_of(home: Path) -> dict[str, dict[str, float]]:
    """Trial -> its metrics, less those of the clock."""
    client = connect(default_uri(home))
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return {
        run.data.tags[tags.TRIAL]: {k: v for k, v in run.data.metrics.items() if "seconds" not in k}
        for run in find_runs(client, experiment)
        if tags.TRIAL in run.data.tags
    }
