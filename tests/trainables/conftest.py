"""Tasks of a small learnable world, built once."""

from __future__ import annotations

import pytest

from trainables.task import TaskFolders

from .worlds import World, build, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """170 users a domain, 120 of them in both."""
    return make_world()


@pytest.fixture(scope="session", params=["ratings", "text"])
def flavour(request: pytest.FixtureRequest) -> str:
    """Where vectors come from."""
    return str(request.param)


@pytest.fixture(scope="session")
def folders(world: World, flavour: str, tmp_path_factory: pytest.TempPathFactory) -> TaskFolders:
    """The task of that world in each flavour."""
    return build(world, tmp_path_factory.mktemp(flavour), flavour)
