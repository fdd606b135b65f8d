"""MLflow's UI on a store, served by this very process: whatever ends the command ends the server."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from mlflow.tracking import MlflowClient

from features.errors import InputError
from study.home import Home
from study.tracking import tags
from study.tracking.runs import connect

_SHOWN = ("best", "search", "score")  # views, in the order of `study.tracking.views`
_NAMES = {"best": "best trials", "search": "all trials", "score": "test scores"}


def links(client: MlflowClient, address: str, plan: str | None) -> Iterator[tuple[str, str]]:
    """Yield (what it shows, address) of each experiment's runs and saved views; of one plan's experiment where it is named.

    Raises InputError where the plan has no experiment.
    """
    found = False
    for experiment in sorted(client.search_experiments(), key=lambda experiment: str(experiment.name)):
        if plan not in (None, experiment.name) or tags.EXPERIMENT_KIND not in experiment.tags:
            continue
        found = True
        runs = f"{address}/#/experiments/{experiment.experiment_id}/runs"
        yield experiment.name, runs
        for view in _SHOWN:
            if f"{tags.VIEW}{view}" in experiment.tags:
                yield f"{experiment.name}, {_NAMES[view]}", f"{runs}?viewStateShareKey={view}"
    if plan is not None and not found:
        raise InputError(f"plan {plan}: nothing of it is in the store; run it first, or leave the plan out")


def serve(uri: str, home: Home, *, host: str, port: int, plan: str | None, say: Callable[[str], None]) -> None:
    """Serve until a signal ends it; `say` takes a line for each link when the server answers.

    Raises InputError for a port that cannot be had and a plan that is not in the store.
    """
    listening = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    try:
        found = list(links(connect(uri), address, plan))
    except InputError:
        listening.close()
        raise
    _configure(uri, home)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own imports
        import uvicorn
        from mlflow.server.fastapi_app import app

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))

    def tell() -> None:
        while not server.started:
            time.sleep(0.1)
        width = max((len(name) for name, _ in found), default=0)
        for name, link in found or [("", address)]:
            say(f"{name:{width}}  {link}")
        say("Ctrl-C ends it")

    threading.Thread(target=tell, daemon=True).start()
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has ended in good order and passes it on
        return


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken on {host}; name another with --port") from error
        raise InputError(f"port {port} of {host}: {error.strerror}; name others with --host and --port") from error
    return listening


def _configure(uri: str, home: Home) -> None:
    """Tell MLflow's server its store, by the names that its own command line uses; no jobs run beside it."""
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

    os.environ[BACKEND_STORE_URI_ENV_VAR] = uri
    os.environ[ARTIFACT_ROOT_ENV_VAR] = home.artifacts.as_uri()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
