"""`study ui`: links to the views, ports that cannot be had, and one process that ends with the command."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from features.errors import InputError
from study.home import Home
from study.tracking.runs import connect, default_uri, open_experiment
from study.tracking.tags import VIEW
from study.tracking.ui import links

from ...patience import PATIENCE_S
from ..tiny import study


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Two experiments of studies, one with two views."""
    home = Home(tmp_path_factory.mktemp("ui"))
    client = connect(default_uri(home.path))
    numbers = [open_experiment(client, name, home.artifacts) for name in ("tiny", "other")]
    for view in ("best", "score"):
        client.set_experiment_tag(numbers[0], f"{VIEW}{view}", "{}")
    return home


def test_links_open_the_saved_views(home: Home) -> None:
    client = connect(default_uri(home.path))
    address = "http://127.0.0.1:5000"
    assert list(links(client, address, "tiny")) == [
        ("tiny", f"{address}/#/experiments/1/runs"),
        ("tiny, best trials", f"{address}/#/experiments/1/runs?viewStateShareKey=best"),
        ("tiny, test scores", f"{address}/#/experiments/1/runs?viewStateShareKey=score"),
    ]
    assert [name for name, _ in links(client, address, None)] == [
        "other", "tiny", "tiny, best trials", "tiny, test scores",
    ]  # fmt: skip
    with pytest.raises(
        InputError, match=r"^plan mine: nothing of it is in the store; run it first, or leave the plan out$"
    ):
        list(links(client, address, "mine"))


def test_a_port_that_cannot_be_had(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = study("ui", "--home", home, "--port", port)
    assert ran.fault == f"port {port} is taken on 127.0.0.1; name another with --port"
    assert study("ui", "--home", home, "--port", 80000).fault.startswith("Invalid value for '--port': 80000 is not in")
    ran = study("ui", "--home", home, "--host", "192.0.2.1")
    assert ran.fault == "port 5000 of 192.0.2.1: Cannot assign requested address; name others with --host and --port"


def test_the_server_is_the_command_and_ends_with_it(home: Home) -> None:
    words = [sys.executable, "-m", "study", "ui", "--home", str(home), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines = []
        while "Ctrl-C ends it" not in lines:
            lines.append(server.stdout.readline().rstrip())
            assert lines[-1], "it ended too early"
        (address,) = {re.findall(r"http://127\.0\.0\.1:\d+", line)[0] for line in lines[:-1]}
        with urllib.request.urlopen(f"{address}/health", timeout=PATIENCE_S) as answer:
            assert answer.status == 200
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
        assert children == "", "a process that outlives it"
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == 0
        assert server.stderr is not None
        assert server.stderr.read() == ""
