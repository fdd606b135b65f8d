"""One finished study in a temporary MLflow store, made once and read by many tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from features.simulate.simulator import SimulateSpec, simulate
from study.tracking.results import Results, load_results

from . import tiny
from .store import MUSIC, Store, full_store


@dataclass(frozen=True)
class Finished:
    """A study that the command line ran from end to end."""

    plan: Path
    home: Path
    ran: tiny.Ran


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of the tiny study; tests copy what they change."""
    return simulate(SimulateSpec(**tiny.SIMULATE), tmp_path_factory.mktemp("raw") / "data")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny study, whole; tests must not change it."""
    import ray

    folder = tmp_path_factory.mktemp("finished")
    plan = tiny.write_plan(folder)
    ray.shutdown()  # other tests start it with another working directory
    ran = tiny.study("run", plan, "--home", folder / "home")
    ray.shutdown()
    return Finished(plan, folder / "home", ran)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished study; tests must add no trial to it."""
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def results(store: Store) -> Results:
    """That study, read back."""
    return load_results(store.uri, store.experiment, MUSIC)
