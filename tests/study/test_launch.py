"""Which Ray a study runs on."""

from __future__ import annotations

import pytest
import ray

from study.jobs import Cluster
from study.launch import connect


def test_without_an_address_no_cluster_that_happens_to_run_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there: joining it would raise."""
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    connect(Cluster())
    try:
        assert len(ray.nodes()) == 1
    finally:
        ray.shutdown()
