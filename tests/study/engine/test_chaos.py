"""The chaos test in a reduced form; `python -m tests.study.chaos` is the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from features.errors import InputError
from tests.study.chaos import CHECKPOINT_S, EPOCH_S, survive


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_study_under_fire_does_exactly_the_planned_work(tmp_path: Path) -> None:
    outcome = survive(tmp_path, cells=2, trials=2, kinds=["trial", "SIGKILL", "raylet"], seed=1)
    assert outcome.restarts >= 1
    assert sum(outcome.kills.values()) >= 2
    lost = CHECKPOINT_S / EPOCH_S + 1  # an interval, and the epoch in progress
    assert outcome.again <= lost * outcome.restarts


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_cluster_refuses_at_once_what_no_node_holds(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from study.engine.launch import _concurrency
    from study.specs import Cluster as Where
    from study.specs import Resources

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        where = Where(address=cluster.address)
        _concurrency(where, Resources(cpus=1, gpus=0.5))
        with pytest.raises(
            InputError, match="2 CPU and 2 GPU, and no node of the cluster has them; it has nodes of 0 CPU"
        ):
            _concurrency(where, Resources(cpus=2, gpus=2))
    finally:
        ray.shutdown()
        cluster.shutdown()
