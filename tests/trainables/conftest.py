"""Tasks of a small learnable world, built once, and one of sequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import HeldOut, SequenceTask, load_held_out, load_task

from .sequence_worlds import make_sequence_task
from .worlds import World, build, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """170 users a domain, 120 of them in both."""
    return make_world()


@pytest.fixture(scope="session", params=["ratings", "text"])
def feature_set(request: pytest.FixtureRequest) -> str:
    """Where vectors come from."""
    return str(request.param)


@pytest.fixture(scope="session")
def folders(world: World, feature_set: str, tmp_path_factory: pytest.TempPathFactory) -> TaskFolders:
    """The task of that world in each feature_set."""
    return build(world, tmp_path_factory.mktemp(feature_set), feature_set)


@pytest.fixture(scope="session")
def sequence_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small task of sequences: what a search sees, and the test folder."""
    return make_sequence_task(tmp_path_factory.mktemp("sequences"))


@pytest.fixture(scope="module")
def task(sequence_folders: tuple[Path, Path]) -> SequenceTask:
    """What training sees of it."""
    return load_task(sequence_folders[0])


@pytest.fixture(scope="module")
def scored(sequence_folders: tuple[Path, Path]) -> HeldOut:
    """Its test rows."""
    return load_held_out(sequence_folders[1])


@pytest.fixture(scope="session")
def worded(world: World, tmp_path_factory: pytest.TempPathFactory) -> TaskFolders:
    """The task of that world with the words of its reviews."""
    return build(world, tmp_path_factory.mktemp("worded"), "ratings", reviews=True)
