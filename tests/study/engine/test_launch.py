"""Which Ray a study runs on, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune

from features.errors import InputError
from study.engine.launch import connect, launch
from study.specs import Cluster, Recipe
from trainables.interface import Selection


def test_without_an_address_no_cluster_that_happens_to_run_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there: joining it would raise."""
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    connect(Cluster())
    try:
        assert len(ray.nodes()) == 1
    finally:
        ray.shutdown()


def test_a_head_is_watched_until_this_process_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the watch of a cluster that was left ends the process 40 s later, though it is in another one by then."""
    ray.shutdown()
    watched: list[tuple[str, Callable[[], bool]]] = []
    monkeypatch.setattr("study.engine.launch.watch_head", lambda head, resume, *, going: watched.append((head, going)))
    connect(Cluster(resume="study resume tiny"))
    try:
        ((first, going),) = watched
        assert going()
        ray.shutdown()
        assert not going()
        connect(Cluster(resume="study resume tiny"))
        assert watched[1][0] != first
        assert [still() for _, still in watched] == [False, True]
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


def test_what_ends_the_tuner_is_raised_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tuner:
        def __init__(self, trainable: Any, *, tune_config: Any, run_config: Any) -> None:
            self._searcher = tune_config.search_alg

        def fit(self) -> None:
            self._searcher.broken = full
            raise tune.TuneError("Traceback (most recent call last): ...")

    recipe = Recipe(experiment="study", home=tmp_path, rows={}, selection=Selection("val_rmse", "minimize"))
    full = OSError("trial x: disk full; make room, the same command goes on")
    monkeypatch.setattr(tune, "Tuner", Tuner)
    for name in ("connect", "_concurrency"):
        monkeypatch.setattr(f"study.engine.launch.{name}", lambda *_: None)
    with pytest.raises(OSError, match=r"^trial x: disk full; make room, the same command goes on$"):
        launch(recipe, [], SimpleNamespace(), name="study")  # type: ignore[arg-type]
