"""Which Ray a study runs on."""

from __future__ import annotations

import pytest
import ray

from features.errors import InputError
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


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()

    def nobody(**how: object) -> None:
        raise ConnectionError("Could not find any running\nRay instance.")

    def stranger(**how: object) -> None:
        raise ConnectionError("Failed to connect") from RuntimeError(
            "ray.exceptions.AuthenticationError: InvalidAuthToken"
        )

    monkeypatch.setattr("ray.init", nobody)
    with pytest.raises(
        InputError, match=r"--address auto: no Ray cluster answers \(Could not find any running Ray inst"
    ):
        connect(Cluster(address="auto"))
    monkeypatch.setattr("ray.init", stranger)
    with pytest.raises(InputError, match="--address h:1: the cluster asks for a token; set RAY_AUTH_MODE=token"):
        connect(Cluster(address="h:1"))
