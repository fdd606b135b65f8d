"""What a machine has that gets in the way of a study, found out or put right before work begins.

Proxies before servers on this machine, and a HOME that cannot be written.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import MutableMapping
from pathlib import Path

from features.local_ray import can_write

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
    if can_write(Path(environment.get("HOME") or "~").expanduser()):
        return
    folder = home.absolute() / "user"
    places = {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "MPLCONFIGDIR": "matplotlib"}
    for name, place in places.items():
        environment.setdefault(name, str(folder / place))
    if "RAY_AUTH_TOKEN_PATH" not in environment:
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would write one to ~/.ray
    _log.warning("HOME %s cannot be written; caches go to %s", environment.get("HOME"), folder)
