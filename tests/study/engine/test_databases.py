"""Optuna's memory in a database that several machines reach, as a plan's `search.storage` names it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from search_spaces import Space, load_space
from study.engine.optuna_study import CellSearch, close_storage, open_database, open_journal
from study.specs import SearchSpec

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nowhere"))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, from Debian's packages."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    if not (BIN / "initdb").is_file():
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if user:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*words: str) -> None:
        subprocess.run(
            [str(BIN / words[0]), *words[1:]], user=user, cwd=folder, check=True, capture_output=True, timeout=60
        )

    run("initdb", "-D", f"{folder}/data", "-U", "study", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options, "-w", "start")
    yield f"postgresql+psycopg://study@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "space.yaml").write_text(
        """
v:
  kind: {CategoricalDistribution: {choices: [a, b]}}
  x: {FloatDistribution: {low: 0.0, high: 1.0}}
  y: {when: {kind: b}, FloatDistribution: {low: 0.001, high: 1.0, log: true}}
"""
    )
    return load_space(f"{tmp_path}/space.yaml/v", ["x", "kind", "y"])


def test_a_server_remembers_as_a_journal_does(
    tmp_path: Path, space: Space, postgres: str, request: pytest.FixtureRequest
) -> None:
    """Two drivers, one after the other, on a server; one driver on a file: the same draws, the same results."""
    spec = SearchSpec(trials=12, seeds=(0,), seed=5, storage=postgres, sampler_args={"n_startup_trials": 4})

    def on_server() -> CellSearch:
        storage = open_database(postgres, "search.storage")
        request.addfinalizer(lambda: close_storage(storage))
        name, owner = "plan/a->b@0.2/0", "home"
        return CellSearch(storage=storage, name=name, space=space, spec=spec, directions=["minimize"], owner=owner)

    def go(search: CellSearch, first: int, last: int) -> list[dict[str, object]]:
        drawn = []
        for number in range(first, last):
            drawn.append(search.draw(number))
            search.tell(number, None if number == 3 else [float(drawn[-1]["x"])])
        return drawn

    one = on_server()
    parts = go(one, 0, 6)
    lost = one.draw(6)
    two = on_server()
    assert two.draw(6) == lost
    parts += go(two, 6, 12)
    journal = CellSearch(
        storage=open_journal(tmp_path / "j.log"), name="n", space=space, spec=spec, directions=["minimize"]
    )
    assert parts == go(journal, 0, 12)
    trials = on_server()._study.trials
    states = [trial.state.name for trial in trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 8
    assert [trial.value for trial in trials] == [trial.value for trial in journal._study.trials]
