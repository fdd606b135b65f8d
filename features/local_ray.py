"""Ray on this machine, for this process alone: with the cores that it may use, in a folder with a short name."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.cores import usable_cores
from features.errors import InputError, one_line

ROOT = Path(__file__).resolve().parents[1]
"""Folder of our packages."""
_STARTS = 3  # how often Ray is started before that is given up: a busy machine may take longer than Ray waits
_SOCKET_BYTES = 107  # what Linux takes as the name of a socket
_RAY_BYTES = len("/ray/session_2026-11-26_19-00-26_409154_1234567/sockets/plasma_store")
_log = logging.getLogger(__name__)


def start_ray(**options: Any) -> None:
    """Start Ray; `options` are those of `ray.init`. Raises InputError where it does not start.

    Ray puts the working directory in front of all else that its workers import from, in which anyone may have a `study.py`
    or a folder `features`. For the time of the start that is the folder of our packages.
    """
    import ray

    for left in reversed(range(_STARTS)):
        try:
            with contextlib.chdir(ROOT):
                ray.init(
                    address="local",  # else Ray joins a cluster that another user of this machine has started
                    num_cpus=usable_cores(), _temp_dir=ray_folder(), log_to_driver=False,
                    include_dashboard=False, **options,
                )  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # Ray raises Exception itself where one of its processes is late
            ray.shutdown()
            if not left or isinstance(error, (ValueError, PermissionError)):
                raise InputError(
                    f"Ray does not start on this machine ({one_line(error, 200)}); see whether memory, processes or open "
                    "files are limited"
                ) from error
        else:
            return


def ray_folder(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return a folder for Ray's files where the temporary one has too long a name for its sockets; None: that will do.

    Raises InputError where no folder with a short name can be written.
    """
    usual = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    if len(os.fsencode(usual)) + _RAY_BYTES <= _SOCKET_BYTES and can_write(Path(usual)):
        return None
    for place in map(Path, ("/tmp", "/var/tmp", "/dev/shm")):
        if place.is_dir() and can_write(place):
            folder = place / f"ray-{os.getuid()}"
            _log.warning("TMPDIR is too long for Ray's sockets, or cannot be written; its files go to %s", folder)
            return str(folder)
    raise InputError(
        f"TMPDIR {usual}: is too long for Ray's sockets, or cannot be written; set RAY_TMPDIR to a short one"
    )


def can_write(folder: Path) -> bool:
    """Whether a file can be made in the folder: permissions do not tell it on all systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
