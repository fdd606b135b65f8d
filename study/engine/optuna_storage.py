"""Where Optuna keeps its studies: a journal file in the home folder, or a database that several machines reach."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from features.errors import InputError, one_line

# Seconds after which a journal lock without progress counts as left behind by a driver that was killed mid-write. No
# write takes longer than milliseconds, and one driver at a time works on a study.
_STALE_LOCK_S = 3
DATABASES = ("postgresql", "mysql", "mariadb", "sqlite")


def open_journal(path: Path) -> BaseStorage:
    """Open the journal file, created when absent; a half-written last line of a killed driver is cut off.

    Optuna itself skips a torn tail when it reads, but appends right behind it, which no later reader survives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _cut_torn_tail(path)
    try:
        return JournalStorage(
            JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), grace_period=_STALE_LOCK_S))
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{path}{_damaged_line(path)}: is damaged ({one_line(error, 100)}); put a copy of the file back, or move it "
            "away: the search then starts anew, and MLflow keeps what is finished"
        ) from error


def _damaged_line(path: Path) -> str:
    """Return `:12` for the first line that is not JSON; nothing where all are."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            return f":{number}"
    return ""


def _cut_torn_tail(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - 4096)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)


def check_database(url: str, place: str) -> None:
    """Raise InputError unless `url` names a database that this installation can talk to; nothing is opened."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    rule = "give a URL such as postgresql+psycopg://user@host/name"
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in DATABASES or not parsed.database:
            raise InputError(f"{place}: must name a database of {', '.join(DATABASES)}; {rule}")
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: is not the URL of a database; {rule}") from error
    except ImportError as error:
        raise InputError(f"{place}: needs the Python package {error.name}; install it") from error


def open_database(url: str, place: str) -> BaseStorage:
    """Open Optuna's tables in a database, made when absent. Passwords are better kept in ~/.pgpass than in a plan.

    A connection that the server dropped between two trials is replaced.
    """
    check_database(url, place)
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds that a writer waits for another
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (SQLAlchemyError, OSError, RuntimeError, KeyError) as error:
        address = make_url(url).render_as_string(hide_password=True)
        reason = one_line(getattr(error, "orig", None) or error, 200)
        raise InputError(
            f"{place}: {address} cannot be used ({reason}); start the server or correct the URL"
        ) from error


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database; a journal has none."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
