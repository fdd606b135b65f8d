"""Clusters of several nodes: what is shared, what comes and goes, and what is shipped to them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.util
import yaml

from study.engine.run import Progress, run_jobs
from study.specs import Cell, Cluster, Job, Recipe, Resources, RowRecipe
from study.tracking import runs as tracking
from study.tracking import tags
from trainables.interface import Selection

from ...patience import PATIENCE_S
from .. import tiny
from ..store import empty_store

FAKES = Path(__file__).parents[1] / "fakes"
ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.slow,
]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster with one node that holds a trial; its workers import the fakes by PYTHONPATH."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", str(FAKES), prepend=os.pathsep)
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


def meet(
    home: Path, address: str, part: str, wait_for: int, trials: int, resources: Resources, on_progress: Any = None
) -> dict[str, float]:
    """Run trials that wait until `wait_for` of them run at once; returns trial name -> how many it saw at once."""
    task = home / part
    task.mkdir(parents=True)
    cell = Cell(source="books", target="movies", ratio=0.2)
    jobs = [
        Job(
            part=part, cell=cell, row="row", model="fake", name=f"n={n}", config={"x": n}, seeds=(0,), feature_set="m",
            task_dir=str(task),
        )
        for n in range(trials)
    ]  # fmt: skip
    row = RowRecipe(trainable="meeting:run", model="fake", base={"stay": 0.3, "wait_for": wait_for})
    recipe = Recipe(
        experiment="study", home=home, rows={"row": row}, selection=Selection("val_rmse", "minimize"),
        resources=resources, cluster=Cluster(address=address),
    )  # fmt: skip
    summary = run_jobs(recipe, jobs, on_progress)
    assert (summary.ran, summary.failures) == (trials, ())
    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("study")
    runs = tracking.find_runs(client, experiment.experiment_id, part)
    return {run.info.run_name: run.data.metrics["side_by_side"] for run in runs if tags.TRIAL in run.data.tags}


def test_a_node_that_comes_is_used_and_a_gpu_is_shared_by_halves(nodes: Any, tmp_path: Path) -> None:
    sys.path.insert(0, str(FAKES))
    empty_store(tmp_path, "study")
    added = []

    def grow(progress: Progress) -> None:
        if progress.running and not added:
            added.append(nodes.add_node(num_cpus=2, num_gpus=1))

    saw = meet(tmp_path, nodes.address, "ablate", 3, 3, Resources(), on_progress=grow)
    assert max(saw.values()) == 3, "the first node holds one, the one that came two"

    saw = meet(tmp_path, nodes.address, "score", 2, 4, Resources(cpus=0.5, gpus=0.5))
    assert max(saw.values()) == 2, "there are cores for four"


# As `ray up` writes it, with Ray's own provider of nodes that are processes of this machine.
FAKE: dict[str, Any] = {
    "cluster_name": "fake", "max_workers": 2, "head_node_type": "ray.head.default", "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "provider": {
        "type": "external", "module": "own_folders.OwnFolders", "use_node_id_as_ip": True, "disable_node_updaters": True,
        "disable_launch_config_check": True, "launch_multiple": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}  # fmt: skip
# A model that is nowhere but in the shipped folder. Its marks say on which node and with which environment it ran.
MINE = """
import os
import time
from pathlib import Path

import ray
from trainables.models import music
from trainables.models.music import ABLATIONS, FIGURES, NAME, SELECTION, TASK_TYPE, Config


def train(config, task, seed):
    marks = Path(os.environ["MARKS"])
    (marks / ray.get_runtime_context().get_node_id()).touch()
    end = time.monotonic() + PATIENCE_S
    while len(list(marks.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    yield from music.train(config, task, seed)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """The head of a cluster that grows by itself, with a dashboard; gives the environment of its user."""
    home = tmp_path / "user"
    home.mkdir()
    config, port = home / "ray_bootstrap_config.yaml", free_port()
    provider = {**FAKE["provider"], "gcs_address": f"{ray.util.get_node_ip_address()}:{port}"}
    config.write_text(yaml.safe_dump({**FAKE, "provider": provider}))
    folder = Path(f"/tmp/study-{os.getpid()}")  # Ray's sockets need a short path
    folder.mkdir()
    env = {
        **os.environ, "HOME": str(home), "PYTHONPATH": str(FAKES), "FOLDERS": str(folder), "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()), "JOBS": f"http://127.0.0.1:{free_port()}",
        "RAY_memory_monitor_refresh_ms": "0",  # which kills the job where other work fills this machine
    }  # fmt: skip
    env.pop("RAY_ADDRESS", None)
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=0", f"--autoscaling-config={config}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={env['JOBS'].rpartition(':')[2]}"]
    words += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    with (tmp_path / "head.txt").open("w") as out:
        head = subprocess.Popen(
            [*RAY, *words, f"--temp-dir={folder}/head"], env=env, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (tmp_path / "head.txt").read_text():
            assert head.poll() is None, (tmp_path / "head.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield env
    finally:
        head.terminate()
        try:
            head.wait(timeout=PATIENCE_S)
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


def test_a_job_brings_its_code_and_environment_to_nodes_that_come_for_it(
    launched: Mapping[str, str], tmp_path: Path
) -> None:
    """What `ray up cluster.yaml` leaves, then the README's `ray job submit`, with the code of the working directory."""
    shipped, marks, home = tmp_path / "shipped", tmp_path / "marks", tmp_path / "home"
    marks.mkdir()
    for name in ("study", "features", "trainables", "search_spaces"):
        shutil.copytree(ROOT / name, shipped / name, ignore=shutil.ignore_patterns("__pycache__"))
    (shipped / "trainables" / "models" / "mine.py").write_text(MINE)
    plan = tiny.write_plan(
        shipped, model="mine", drop=("sweeps", "ablate", "score"), cold_ratios=[0.5], search={"trials": 3, "seeds": [0]}
    )
    text = plan.read_text().replace(f"{shipped}/space.yaml", "space.yaml")  # as it is found over there
    plan.write_text(text)
    words = ["job", "submit", "--address", launched["JOBS"], "--working-dir", str(shipped)]
    words += ["--runtime-env-json", f'{{"env_vars": {{"MARKS": "{marks}"}}}}', "--"]
    verb = ["python", "-m", "study", "run", "plan.yaml", "--address", "auto", "--home", str(home)]
    ran = subprocess.run(
        [*RAY, *words, *verb],
        env=launched,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "search: 3 planned, 3 trials run" in ran.stdout
    assert len(list(marks.iterdir())) == 2, "both nodes that the autoscaler may start were used"
    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("tiny")
    runs = list(tracking.find_runs(client, experiment.experiment_id, "search"))
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = [run.data.tags for run in runs if tags.TRIAL in run.data.tags]
    assert len(trials) == 3
    assert {run_tags[tags.COMMIT][:6] for run_tags in trials} == {"files:"}, "code without a history has a name too"
