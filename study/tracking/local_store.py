"""The MLflow store in a home folder, a SQLite file: its address, whether it can be read, and what to do when it moved.

MLflow keeps absolute paths in it. A home folder that was moved, renamed or copied has those of its old place: they are
rewritten when the store is first opened at the new one, so that a copy never writes into the home that it was copied from.
Where the store cannot be written, `place_of_artifacts` finds a run's files from the store's own folder.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlparse
from urllib.request import url2pathname

from features.errors import InputError, one_line
from features.store.folders import locked
from study.home import Home, process_at

LOCK_S = 60.0
"""How long a store that another process holds is waited for."""
_PREFIX = "sqlite:///"
_PLAIN = re.compile(r"[^%?#]*")  # what SQLAlchemy and MLflow take as it is
_PATHS = (  # tables and columns in which MLflow 3 keeps what we give it
    ("experiments", "artifact_location"),
    ("experiment_tags", "value"),
    ("runs", "artifact_uri"),
    ("tags", "value"),
    ("logged_models", "artifact_location"),
    ("logged_model_tags", "tag_value"),
    ("registered_models", "description"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("model_versions", "description"),
    ("model_version_tags", "value"),
)

_log = logging.getLogger(__name__)


def default_uri(home: Path) -> str:
    """Return the address of the store without a server: SQLite in the study's home.

    A path with `%`, `?` or `#` is quoted whole, slashes too, because MLflow makes the folder that it reads in an address.
    """
    path = str(Home(home).database)
    return _PREFIX + (path if _PLAIN.fullmatch(path) else quote(path, safe=""))


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for any other address."""
    if not uri.startswith(_PREFIX):
        return None
    path = uri.removeprefix(_PREFIX)
    return Path(path.partition("?")[0] if "/" in path else unquote(path))


def check_store(database: Path) -> None:
    """Wait for a store that another process holds, and bring its paths to where it lies now; a new file is left alone.

    Raises InputError where the file is damaged, or held for longer than LOCK_S.
    """
    if not database.is_file() or database.stat().st_size == 0:
        return
    end, said = time.monotonic() + LOCK_S, False
    while True:
        try:
            _move(database)
        except sqlite3.OperationalError as error:
            # Errors that Python's module raises itself have no code.
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_ROLLBACK:
                raise InputError(
                    f"{database}: a process ended while it wrote to it, and you may not write here to take that back; "
                    f"let its owner open it once, with: study ui --home {shlex.quote(str(database.parent))}"
                ) from error
            if "locked" not in str(error) and "busy" not in str(error):
                raise InputError(f"{database}: SQLite cannot read it ({error}); {_REMEDY}") from error
            if time.monotonic() > end:
                raise InputError(
                    f"{database}: {_held(database)} since {LOCK_S:.0f} s; wait for it, or end it"
                ) from error
            if not said:
                _log.warning("waiting for %s: %s", database, _held(database))
            said = True
            time.sleep(0.5)
        except sqlite3.DatabaseError as error:
            _refuse_cut(database)
            raise InputError(f"{database}: is no SQLite store any more ({one_line(error)}); {_REMEDY}") from error
        else:
            return


@contextmanager
def making(database: Path) -> Iterator[bool]:
    """Let one process at a time make the tables of a new store, because two at once fail; yields whether it is new.

    Who makes them holds the lock until all are there: MLflow makes them in steps, and notes a version after each.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = database.with_name(".mlflow.lock")
    if not os.access(lock if lock.exists() else lock.parent, os.W_OK):  # read-only, or another user's
        yield False
        return
    with locked(lock):
        if not _has_tables(database):
            yield True
            return
    yield False


def _has_tables(database: Path) -> bool:
    """Whether MLflow has made tables: it notes their version."""
    if not database.is_file():
        return False
    try:
        with closing(_opened(database)) as base:
            return base.execute("SELECT version_num FROM alembic_version").fetchone() is not None
    except sqlite3.OperationalError:
        return False


def place_of_artifacts(logged: str, tracking_uri: str) -> str:
    """Return where artifacts of a run or a model lie: beside the SQLite store, where they are, else as the store says."""
    database, path = database_file(tracking_uri), local_path(logged)
    if database is not None and path is not None and not Path(path).is_dir():
        names = Path(path).parts
        parts = names[-3:] if names[-3:-2] == ("models",) else names[-2:]
        beside = Home(database.parent).artifacts.joinpath(*parts)
        if beside.is_dir():
            return beside.as_uri()
    return logged


_REMEDY = "put a copy of it back, or move the file away and run the study again"


def _refuse_cut(database: Path) -> None:
    """Hold the size that the file's first page names against the size that it has."""
    with database.open("rb") as file:
        head = file.read(100)
    size = int.from_bytes(head[16:18], "big")
    pages = int.from_bytes(head[28:32], "big") if head[24:28] == head[92:96] else 0
    wanted = pages * (65536 if size == 1 else size)
    if len(head) == 100 and database.stat().st_size < wanted:
        raise InputError(f"{database}: has {database.stat().st_size:,} of its {wanted:,} bytes: it was cut; {_REMEDY}")


def _held(database: Path) -> str:
    """Say who has the file open, as far as this machine shows it."""
    holders = sorted(set(_open_by(database)) - {os.getpid()})
    if not holders:
        return "locked by a process of another user or machine"
    named = ", ".join(f"{number} ({_command(number)})" for number in holders)
    return f"locked by another process, {'one of ' if len(holders) > 1 else ''}{named}"


def _open_by(path: Path) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(file.samefile(path) for file in (folder / "fd").iterdir() if os.readlink(file).startswith("/")):
                yield int(folder.name)


def _command(number: int) -> str:
    with suppress(OSError):
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        return one_line(b" ".join(words).decode(errors="replace"), 60)
    return "gone"


def _opened(database: Path) -> sqlite3.Connection:
    """Open a store, to write where that may be: SQLite then takes back what a killed process left half-written."""
    mode = "rw" if _writable(database) else "ro"
    return sqlite3.connect(f"file:{quote(str(database.absolute()))}?mode={mode}", uri=True, timeout=1)


def _move(database: Path) -> None:
    """Rewrite the paths of the place where the store was made, in one transaction; nothing where it lies there still."""
    home = Home(database.parent)
    with closing(_opened(database)) as base:
        places = _places(base)
    old = next((place for place in places if not _same(Path(local_path(place) or ""), home.artifacts)), None)
    # A file that was copied alone keeps its paths. A home that a study works on may have several names, one in a container.
    if (
        old is None
        or not home.artifacts.is_dir()
        or not _writable(database)
        or any(map(process_at, home.path.glob("*.lock")))
    ):
        return
    before = Home(Path(local_path(old) or "").parent)
    pairs = [
        (old, home.artifacts.as_uri()),
        (f"--home {shlex.quote(str(before))}", f"--home {shlex.quote(str(home))}"),
        (repr(default_uri(before.path)), repr(default_uri(home.path))),
    ]
    with closing(sqlite3.connect(database, timeout=1)) as base, base:
        base.execute("BEGIN IMMEDIATE")
        for table, column in _PATHS:
            for then, now in pairs:
                base.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)", (then, now, then)
                )
    _log.info("%s: was made in %s; its paths are now those of %s", database, before, home)


def _places(base: sqlite3.Connection) -> list[str]:
    """Return the folders of artifacts that the experiments of a study have; none in a store that has no tables yet."""
    named = base.execute("SELECT name FROM sqlite_master WHERE name = 'experiments'").fetchall()
    if not named:
        return []
    found = base.execute("SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%'")
    return [place for (place,) in found if place.endswith("/artifacts")]


def local_path(uri: str) -> str | None:
    """Return the path in a `file:` address; None for any other one."""
    return url2pathname(urlparse(uri).path) if urlparse(uri).scheme == "file" else None


def _writable(database: Path) -> bool:
    return os.access(database, os.W_OK) and os.access(database.parent, os.W_OK)


def _same(one: Path, other: Path) -> bool:
    """Whether both paths are of one folder: a home may be reached by a link too."""
    try:
        return one.samefile(other)
    except OSError:
        return one == other
