"""Clusters of several nodes: what is shared, what comes and goes, and what is shipped to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from study import tracking
from study.engine import Progress, run_jobs
from study.jobs import Cell, Cluster, Job, Resources

from .store import empty_store

FAKES = Path(__file__).parent / "fakes"
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster with one node that holds a trial; workers import from the folder of the fakes."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    ray.shutdown()
    before = Path.cwd()
    os.chdir(FAKES)
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()
    os.chdir(before)


def meet(
    home: Path, address: str, part: str, wait_for: int, trials: int, resources: Resources, **how: Any
) -> dict[str, float]:
    """Run trials that wait until `wait_for` of them run at once; returns trial name -> how many it saw at once."""
    task = home / part
    task.mkdir(parents=True)
    cell = Cell(source="books", target="movies", ratio=0.2)
    summary = run_jobs(
        experiment="study", home=home,
        jobs=[
            Job(part=part, cell=cell, name=f"n={n}", config={"x": n}, seeds=(0,), features="m", task_dir=str(task))
            for n in range(trials)
        ],
        trainable="meeting:run", model="fake", base={"stay": 0.3, "wait_for": wait_for}, selection=("val_rmse", "minimize"),
        resources=resources, cluster=Cluster(address=address), **how,
    )  # fmt: skip
    assert (summary.ran, summary.failures) == (trials, ())
    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("study")
    found = tracking.find_runs(client, experiment.experiment_id, part)
    return {run.info.run_name: run.data.metrics["side_by_side"] for run in found if "study.trial" in run.data.tags}


def test_a_node_that_comes_is_used_and_a_gpu_is_shared_by_halves(nodes: Any, tmp_path: Path) -> None:
    sys.path.insert(0, str(FAKES))
    empty_store(tmp_path, "study")
    added = []

    def grow(progress: Progress) -> None:
        if sum(progress.running.values()) and not added:
            added.append(nodes.add_node(num_cpus=2, num_gpus=1))

    saw = meet(tmp_path, nodes.address, "ablate", 3, 3, Resources(), on_progress=grow)
    assert max(saw.values()) == 3, "the first node holds one, the one that came two"

    saw = meet(tmp_path, nodes.address, "score", 2, 4, Resources(cpus=0.5, gpus=0.5))
    assert max(saw.values()) == 2, "there are cores for four"
