"""Where Optuna keeps its studies: a journal that survives a killed driver, and a database that several machines reach."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.errors import InputError
from search_spaces import Space
from study.engine.optuna_storage import close_storage, open_database
from study.engine.optuna_study import CellStudy
from study.specs import SearchSpec

from ...patience import PATIENCE_S
from .searches import make_space, open_search, run, spec

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
            [str(BIN / words[0]), *words[1:]],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )

    run("initdb", "-D", f"{folder}/data", "-U", "study", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options, "-w", "start")
    yield f"postgresql+psycopg://study@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return make_space(tmp_path)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^search.storage: postgresql\+psycopg://u:\*\*\*@127.0.0.1:1/d cannot be used"
    ):
        open_database("postgresql+psycopg://u:secret@127.0.0.1:1/d", "search.storage")


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b"\xff" * 9000])
def test_a_journal_with_a_torn_tail_goes_on(tmp_path: Path, space: Space, torn: bytes) -> None:
    drawn = run(open_search(tmp_path, space, spec()), range(3))
    journal = tmp_path / "optuna" / "study.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    more = run(open_search(tmp_path, space, spec()), range(3, 5))
    assert journal.read_bytes().startswith(whole + b"{")
    again = open_search(tmp_path, space, spec())
    assert [again.ask(number) for number in range(5)] == drawn + more


def test_a_journal_with_a_hole_is_one_line_with_its_place(tmp_path: Path, space: Space) -> None:
    run(open_search(tmp_path, space, spec()), range(2))
    journal = tmp_path / "optuna" / "study.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:20] + bytes(4) + lines[3][24:]
    journal.write_bytes(b"".join(lines))
    with pytest.raises(
        InputError, match=r"study.log:4: is damaged \(.*\); put a copy of the file back, or move it away"
    ):
        open_search(tmp_path, space, spec())
    assert journal.read_bytes() == b"".join(lines)


def test_a_lock_of_a_killed_driver_is_broken_within_seconds(tmp_path: Path, space: Space) -> None:
    run(open_search(tmp_path, space, spec()), range(1))
    (tmp_path / "optuna" / "study.log.lock").symlink_to(tmp_path / "optuna" / "study.log")
    assert len(run(open_search(tmp_path, space, spec()), range(1, 2))) == 1


def test_a_server_remembers_as_a_journal_does(
    tmp_path: Path, space: Space, postgres: str, request: pytest.FixtureRequest
) -> None:
    """Two drivers, one after the other, on a server; one driver on a file: the same draws, the same results."""
    search = SearchSpec(trials=12, seeds=(0,), seed=5, storage=postgres, sampler_args={"n_startup_trials": 4})

    def on_server() -> CellStudy:
        storage = open_database(postgres, "search.storage")
        request.addfinalizer(lambda: close_storage(storage))
        return open_search(tmp_path, space, search, "plan/a->b@0.2/row/0", storage=storage, owner="home")

    def go(study: CellStudy, first: int, last: int) -> list[dict[str, object]]:
        drawn = []
        for number in range(first, last):
            drawn.append(study.ask(number))
            if number == 3:
                study.fail(number)
            else:
                study.complete(number, {"val_rmse": float(drawn[-1]["x"])}, 1)
        return drawn

    one = on_server()
    parts = go(one, 0, 6)
    lost = one.ask(6)
    two = on_server()
    assert two.ask(6) == lost
    parts += go(two, 6, 12)
    journal = open_search(tmp_path, space, search)
    assert parts == go(journal, 0, 12)
    trials = on_server()._study.trials
    states = [trial.state.name for trial in trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 8
    assert [trial.value for trial in trials] == [trial.value for trial in journal._study.trials]
