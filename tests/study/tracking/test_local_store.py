"""The SQLite store of a home folder: its address, damage, and other processes that hold it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from features.errors import InputError
from features.store.folders import locked
from study.home import Home
from study.tracking import local_store
from study.tracking.local_store import check_store, database_file, default_uri, place_of_artifacts
from study.tracking.runs import connect, open_experiment

HOLD = """
import sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""

KILLED = """
import os, signal, sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("PRAGMA cache_size = 1")  # what changes goes to the file before the transaction ends
base.execute("BEGIN")
base.execute("UPDATE experiments SET name = 'half' WHERE name = 'tiny'")
base.execute("CREATE TABLE filled AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 5000) "
             "SELECT hex(randomblob(200)) FROM n")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an experiment in its store; tests copy it."""
    home = tmp_path_factory.mktemp("made")
    open_experiment(connect(default_uri(home)), "tiny", Home(home).artifacts)
    return home


@pytest.fixture
def database(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes((made / "mlflow.db").read_bytes())
    (tmp_path / "artifacts").mkdir()
    return tmp_path / "mlflow.db"


@pytest.mark.parametrize("name", ["runs", "my runs", "a%2Fb", "what?", "a#b", "ü/[x]", "it's"])
def test_an_address_names_the_file(tmp_path: Path, name: str) -> None:
    from sqlalchemy import make_url

    uri, file = default_uri(tmp_path / name), tmp_path / name / "mlflow.db"
    assert database_file(uri) == file
    assert make_url(uri).database == str(file)


def test_other_addresses_have_no_file() -> None:
    assert database_file("http://tracking:5000") is None
    assert database_file("postgresql://study@db/mlflow") is None
    assert database_file("sqlite:////a/b.db?timeout=5") == Path("/a/b.db")


def test_a_store_that_has_moved_names_its_new_place_once(database: Path, made: Path) -> None:
    check_store(database)
    with sqlite3.connect(database) as base:
        places = base.execute("SELECT artifact_location FROM experiments WHERE name = 'tiny'").fetchall()
    assert places == [(f"file://{database.parent}/artifacts",)]
    before = database.read_bytes()
    check_store(database)
    assert database.read_bytes() == before


def test_a_store_that_a_study_works_on_keeps_its_paths(database: Path, made: Path) -> None:
    import fcntl

    with (database.parent / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_store(database)
    with sqlite3.connect(database) as base:
        ((place,),) = base.execute("SELECT artifact_location FROM experiments WHERE name = 'tiny'").fetchall()
    assert place == f"file://{made}/artifacts"


def test_artifacts_lie_beside_the_store_where_they_are(tmp_path: Path) -> None:
    run, model = tmp_path / "artifacts" / "r1" / "artifacts", tmp_path / "artifacts" / "models" / "m-1" / "artifacts"
    for folder in (run, model):
        folder.mkdir(parents=True)
        gone = f"file:///gone/{folder.relative_to(tmp_path)}"
        assert place_of_artifacts(gone, default_uri(tmp_path)) == folder.as_uri()
        assert place_of_artifacts(gone, "http://tracking:5000") == gone
    assert place_of_artifacts("s3://bucket/r1/artifacts", default_uri(tmp_path)) == "s3://bucket/r1/artifacts"
    assert place_of_artifacts("file:///gone/r2/artifacts", default_uri(tmp_path)) == "file:///gone/r2/artifacts"


def test_a_cut_store(database: Path) -> None:
    whole = database.stat().st_size
    os.truncate(database, whole // 2)
    with pytest.raises(InputError, match=rf"mlflow.db: has [\d,]+ of its {whole:,} bytes: it was cut; put a copy"):
        connect(default_uri(database.parent))


def test_what_a_killed_process_left_half_written_is_taken_back(database: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(database)], check=False)
    journal = database.with_name("mlflow.db-journal")
    assert journal.stat().st_size > 0, "SQLite calls it hot: the next to open the file has to roll back"
    names = {experiment.name for experiment in connect(default_uri(database.parent)).search_experiments()}
    assert names == {"Default", "tiny"}
    assert not journal.exists()


def test_one_who_may_not_write_is_told_who_can_take_it_back(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(database)], check=False)
    monkeypatch.setattr(local_store, "_writable", lambda database: False)
    with pytest.raises(InputError, match=r"mlflow.db: a process ended while it wrote to it, .*: study ui --home "):
        check_store(database)


def test_a_file_that_is_no_store(database: Path) -> None:
    database.write_text("not a database, but long enough to be taken for one\n" * 20)
    with pytest.raises(
        InputError, match=r"mlflow.db: is no SQLite store any more \(file is not a database\); put a copy"
    ):
        connect(default_uri(database.parent))


def test_a_locked_store_is_waited_for_and_its_holder_named(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = [sys.executable, "-c", HOLD, str(database)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with monkeypatch.context() as impatient:
            impatient.setattr(local_store, "LOCK_S", 0.0)
            with pytest.raises(
                InputError, match=rf"mlflow.db: locked by another process, {other.pid} \(.*python.* since"
            ):
                connect(default_uri(database.parent))
        caplog.clear()
        monkeypatch.setattr(local_store.time, "sleep", lambda seconds: other.stdin and other.stdin.close())
        check_store(database)  # the holder ends while it waits
        assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [f"waiting for {database}"]
    check_store(database)


def test_tables_that_are_being_made_are_waited_for(tmp_path: Path) -> None:
    """MLflow notes a version after each of its steps: that one is there says not that all are."""
    database, told = tmp_path / "mlflow.db", list[bool]()
    with closing(sqlite3.connect(database)) as base:
        base.execute("CREATE TABLE alembic_version (version_num TEXT)")
        base.execute("INSERT INTO alembic_version VALUES ('of the first step')")
        base.commit()

    def ask() -> None:
        with local_store.making(database) as new:
            told.append(new)

    asking = threading.Thread(target=ask)
    with locked(tmp_path / ".mlflow.lock"):
        asking.start()
        asking.join(0.5)
        assert told == []
    asking.join()
    assert told == [False]


def test_two_processes_make_one_store(tmp_path: Path) -> None:
    program = (
        "import sys; from study.tracking.runs import connect; print(len(connect(sys.argv[1]).search_experiments()))"
    )
    words = [sys.executable, "-W", "ignore", "-c", program, default_uri(tmp_path)]
    pair = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in pair]
    assert [(out, process.returncode) for (out, _), process in zip(said, pair, strict=True)] == [("1\n", 0)] * 2, said
