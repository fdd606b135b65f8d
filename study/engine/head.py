"""A watch over the head of the Ray cluster, which ends this process in one line when the head is lost.

Ray's own library ends a process that has lost its head after a minute, with pages of its state. What a study has finished
stands in its stores by then, and what was running goes on from its checkpoint, so nothing has to be saved first.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

LOST_S = 40.0
"""A head that has not answered for so long is lost; Ray gives up after 60 s."""
_PAUSE_S = 2.0
_log = logging.getLogger(__name__)


def watch_head(address: str, resume: str, *, going: Callable[[], bool]) -> None:
    """Begin to watch the head at `host:port`, as long as `going`."""
    threading.Thread(target=_watch, args=(address, resume, going), name="head", daemon=True).start()


def _watch(address: str, resume: str, going: Callable[[], bool]) -> None:
    seen = time.monotonic()
    while going():
        if answers(address):
            seen = time.monotonic()
        elif time.monotonic() - seen > LOST_S:
            _log.error(
                "Ray's head at %s has not answered for %.0f s; what is finished is kept; when it is back, go on with `%s`",
                address, LOST_S, resume,
            )  # fmt: skip
            os._exit(2)
        time.sleep(_PAUSE_S)


def answers(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PAUSE_S):
            return True
    except OSError:
        return False
