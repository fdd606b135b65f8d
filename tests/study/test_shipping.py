"""Tasks on nodes that do not see the home folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from features.store import FeatureTable
from study import shipping
from study.shipping import TaskServer, cached, locate, pack
from study.tracking import connect, default_uri, find_runs
from tests.trainables.worlds import SPLIT, domains_of, make_world, text_vectors
from trainables.task import TaskFolders, build_task, find_vectors, load_held_out, load_task

from . import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TaskFolders, FeatureTable]:
    """A task whose vectors are in feature tables elsewhere, and one of these; both sent to this node, then gone at home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, target = domains_of(make_world(), tmp_path)
    vectors = text_vectors(source, target, tmp_path)
    folders = build_task(SPLIT, source, target, vectors, tmp_path / "home" / "tasks")
    for folder in (folders.task_dir, folders.test_dir):
        shipping._unpack(pack(folder), folder)
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


def test_what_a_worker_made_is_kept_whole(tmp_path: Path) -> None:
    TaskServer().keep(str(tmp_path / "tasks" / "models" / "a.pt"), b"weights")
    assert [path.name for path in (tmp_path / "tasks" / "models").iterdir()] == ["a.pt"]
    assert (tmp_path / "tasks" / "models" / "a.pt").read_bytes() == b"weights"


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
        node.wait(60)


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
    plan = tiny.write_plan(tmp_path, drop=("sweeps", "ablate"), ratios=[0.2])
    home, one, cache = tmp_path / "home", tmp_path / "one", tmp_path / "cache"
    cache.mkdir()
    for verb in ("search", "score"):
        command(verb, plan, "--home", one)
    command("extract", plan, "--home", home)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        with blind_node(cluster.address, home, cache):
            ray.init(address=cluster.address, log_to_driver=False)
            until = time.monotonic() + 120
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
        run.data.tags["study.trial"]: {k: v for k, v in run.data.metrics.items() if "seconds" not in k}
        for run in find_runs(client, experiment)
        if "study.trial" in run.data.tags
    }
