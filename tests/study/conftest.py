"""One finished study in a temporary MLflow store, made once and read by many tests."""

from __future__ import annotations

import pytest

from study.results import Results, load_results

from .store import Store, full_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished study; tests must add no trial to it."""
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def results(store: Store) -> Results:
    """That study, read back."""
    return load_results(store.uri, store.experiment)
