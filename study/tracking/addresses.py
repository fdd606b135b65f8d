"""Addresses of MLflow stores: what kind they are, and how they are shown."""

from __future__ import annotations

import re
import shlex


def is_server(uri: str) -> bool:
    """Whether a store is behind a server."""
    return uri.startswith(("http://", "https://"))


def is_database(uri: str) -> bool:
    """Whether a store is a database that a server holds; a SQLite file is none."""
    return re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri) is not None


def without_password(uri: str) -> str:
    """Return a store's address as readers of a tag or a page may see it."""
    return re.sub(r"(//[^/:@]*):[^/]*@", r"\1@", uri)


def naming(uri: str | None) -> str:
    """Return the words that a command on a named store begins with; nothing for the file in the home folder."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(without_password(uri))} " if uri else ""
