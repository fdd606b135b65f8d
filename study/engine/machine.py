"""What a machine has that gets in the way of a study, found out or put right before work begins.

Proxies before servers on this machine, a HOME that cannot be written, a temporary folder with a long name.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from features.errors import InputError

_SOCKET_BYTES = 107  # what Linux takes as the name of a socket
_RAY_BYTES = len("/ray/session_2026-11-26_19-00-26_409154_1234567/sockets/plasma_store")
_log = logging.getLogger(__name__)


def direct_to_this_machine(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep servers on this machine from being asked for through a proxy: it holds them up for minutes, or refuses."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in environment):
        return
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in environment.get(name, "").split(",") if host]
        ours = ("localhost", "127.0.0.1", "::1", socket.gethostname())
        environment[name] = ",".join(dict.fromkeys([*hosts, *ours]))


def user_folders(home: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Where HOME cannot be written, let Ray's token and caches go to the home folder of the study instead."""
    if _can_write(Path(environment.get("HOME") or "~").expanduser()):
        return
    folder = home.absolute() / "user"
    places = {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "MPLCONFIGDIR": "matplotlib"}
    for name, place in places.items():
        environment.setdefault(name, str(folder / place))
    if "RAY_AUTH_TOKEN_PATH" not in environment:
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would write one to ~/.ray
    _log.warning("HOME %s cannot be written; caches go to %s", environment.get("HOME"), folder)


def ray_folder(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return a folder for Ray's files where the temporary one has too long a name for its sockets; None: that will do.

    Raises InputError where no folder with a short name can be written.
    """
    usual = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    if len(os.fsencode(usual)) + _RAY_BYTES <= _SOCKET_BYTES and _can_write(Path(usual)):
        return None
    for place in map(Path, ("/tmp", "/var/tmp", "/dev/shm")):
        if place.is_dir() and _can_write(place):
            folder = place / f"ray-{os.getuid()}"
            _log.warning("TMPDIR is too long for Ray's sockets, or cannot be written; its files go to %s", folder)
            return str(folder)
    raise InputError(
        f"TMPDIR {usual}: is too long for Ray's sockets, or cannot be written; set RAY_TMPDIR to a short one"
    )


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in the folder: permissions do not tell it on all systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
