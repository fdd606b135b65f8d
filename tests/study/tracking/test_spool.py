"""A tracking server that goes away and comes back: no trial waits for it, no metric is lost, nothing is written twice."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from features.errors import InputError
from study.specs import Cell, Job
from study.tracking import runs as tracking
from study.tracking import spool, tags
from study.tracking.runs import EpochReport, PartTracker
from study.tracking.spool import Spool, answers

from ...patience import PATIENCE_S

JOB = Job(
    part="search", cell=Cell(source="books", target="movies", ratio=0.2), row="music", model="music", name="0000",
    config={}, seeds=(0, 1), feature_set="main", task_dir="task",
)  # fmt: skip


def epoch(number: int, *, final: bool = False) -> EpochReport:
    artifacts: dict[str, str | bytes] = {"per_user.csv": "seed,user\n", "raw.bin": b"\x00\xff"} if final else {}
    metrics = {"val_rmse": 1.0 / number}
    return EpochReport(epoch=number, metrics=metrics, final=final, artifacts=artifacts, time_ms=1000 + number)


# --- a real server on the loopback, artifacts through HTTP ----------------------------------------------------------


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """`mlflow server` with SQLite and artifacts of its own; this process knows its address alone."""
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "served")]
    with (folder / "server.txt").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, *store], stdout=out, stderr=out, start_new_session=True
        )
    try:
        uri, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
        while not answers(uri):
            assert process.poll() is None, (folder / "server.txt").read_text()
            assert time.monotonic() < end, (folder / "server.txt").read_text()
            time.sleep(0.3)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_server_that_is_away_costs_no_trial_and_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def part() -> PartTracker:
        uri = f"http://127.0.0.1:{port}"
        return tracking.open_part(home=tmp_path, uri=uri, experiment="e", part="search", run_tags={}, metric="val_rmse")

    with server(tmp_path, port):
        tracker = part()
        tracker.start_part()
        tracker.start(JOB, config={"lr": 1e-5}, document={"config": {"lr": 1e-5}}, fingerprint="f")
        tracker.report(JOB.trial, [epoch(1)])
    tracker.report(JOB.trial, [epoch(2), epoch(3)])
    tracker.finish(JOB.trial, epoch(3, final=True))
    other = Job(**{**vars(JOB), "name": "0001"})
    tracker.start(other, config={}, document={"config": {}}, fingerprint="f")
    tracker.report(other.trial, [epoch(1)])
    monkeypatch.setattr(tracking, "LAST_WORDS_S", 0.1)
    with pytest.raises(InputError, match=r"MLflow: the server is away; \d+ writes are kept in the home folder"):
        tracker.end_part("KILLED")
    with pytest.raises(InputError, match=r"MLflow at http://127.0.0.1:\d+: does not answer; \d+ writes of an earlier"):
        part()

    with server(tmp_path, port) as uri:
        again = part()
        (first,), (second,) = again.runs[JOB.trial], again.runs[other.trial]
        assert (first.status, second.status) == ("FINISHED", "KILLED")
        again.resume(second)
        again.start_part()
        again.start(other, config={}, document={"config": {}}, fingerprint="f")
        again.report(other.trial, [epoch(1), epoch(2)])
        again.finish(other.trial, epoch(2, final=True))
        again.end_part("FINISHED")
        assert list((tmp_path / "spool" / "e").iterdir()) == []
        client = tracking.connect(uri)
        runs = {
            run.info.run_name: run
            for run in tracking.find_runs(client, client.get_experiment_by_name("e").experiment_id)
        }
        assert sorted(runs) == ["books->movies@0.2 search music 0000", "books->movies@0.2 search music 0001", "search"]
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        for name, steps in (("0000", [1, 2, 3]), ("0001", [1, 2])):
            run = runs[f"books->movies@0.2 search music {name}"]
            history = client.get_metric_history(run.info.run_id, "epoch/val_rmse")
            assert [entry.step for entry in history] == steps
            assert run.data.tags[tags.COMMAND].startswith(f"MLFLOW_TRACKING_URI={uri} study rerun {run.info.run_id} ")
            assert run.data.tags["mlflow.parentRunId"] == runs["search"].info.run_id
        assert {file.path for file in client.list_artifacts(first.run_id)} == {"config.yaml", "per_user.csv", "raw.bin"}
        raw = Path(client.download_artifacts(first.run_id, "raw.bin", str(tmp_path)))
        assert raw.read_bytes() == b"\x00\xff"
        assert list((tmp_path / "served").rglob("raw.bin")), "through HTTP into the server's own folder"


# --- without a server -----------------------------------------------------------------------------------------------


class Server:
    """Notes its calls; `fail` raises that often, `error` always; `runs` are what a search finds."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail = 0
        self.error: Exception | None = None
        self.runs: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any, **named: Any) -> Any:
            if self.fail:
                self.fail -= 1
                raise RuntimeError("no")
            if self.error is not None:
                raise self.error
            self.calls.append((name, *words))
            return self.runs if name == "search_runs" else SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        return call


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    state = {"answers": True}
    monkeypatch.setattr(spool, "answers", lambda uri: state["answers"])
    monkeypatch.setattr(spool, "_PAUSE_S", 0.01)
    return state


def opened(to: Any, folder: Path) -> Spool:
    return Spool(to, "http://nowhere", folder)


def test_what_a_dead_driver_had_not_sent_goes_first(tmp_path: Path, there: dict[str, bool]) -> None:
    first, to = opened(Server(), tmp_path), Server()
    there["answers"] = False
    run_id = first.create_run("1", run_name="n", tags={tags.PART: "search"}).info.run_id
    first.set_tag(run_id, "command", f"rerun {run_id}")
    assert not first.close(0.05)
    with (tmp_path / "writes.jsonl").open("a") as file:
        file.write('["set_tag", "half')
    there["answers"] = True
    again = opened(to, tmp_path)
    again.set_terminated(run_id, "KILLED")
    assert again.close(10)
    assert [call[:3] for call in to.calls] == [
        ("search_runs", ["1"], f"tags.`study.write` = '{run_id}'"), ("create_run", "1"), ("set_tag", "r1", "command"),
        ("set_terminated", "r1", "KILLED"),
    ]  # fmt: skip
    assert to.calls[2][3] == "rerun r1", "the server's id, wherever ours stood"
    assert list(tmp_path.iterdir()) == []


def test_what_is_stopped_sends_no_more(tmp_path: Path, there: dict[str, bool]) -> None:
    """The next driver may be in this very process, and sends the same writes from the same files."""
    to = Server()
    writer = opened(to, tmp_path)
    there["answers"] = False
    writer.set_tag("r1", "a", "b")
    writer.stop()
    there["answers"] = True
    writer._thread.join(PATIENCE_S)
    assert (writer._thread.is_alive(), to.calls, writer.waiting) == (False, [], 1)
    again = opened(to, tmp_path)
    assert again.close(PATIENCE_S)
    assert to.calls == [("set_tag", "r1", "a", "b")]


def test_a_write_that_arrives_after_the_end_is_not_noted(tmp_path: Path, there: dict[str, bool]) -> None:
    """The next driver has read the notes by then, so a second note of one write would stand for another write."""
    writer: Spool

    class Slow(Server):
        def set_tag(self, *words: Any) -> None:
            self.calls.append(("set_tag", *words))
            writer.stop()

    writer = opened(to := Slow(), tmp_path)
    writer.set_tag("r1", "a", "b")
    writer._thread.join(PATIENCE_S)
    assert (writer._thread.is_alive(), len(to.calls)) == (False, 1)
    assert not (tmp_path / "sent.txt").exists()


def test_a_part_that_cannot_be_opened_leaves_nobody_who_sends(
    tmp_path: Path, there: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(Server(), tmp_path / "spool" / "e")
    there["answers"] = False
    first.set_tag("r1", "a", "b")
    assert not first.close(0.01)
    asked: list[Spool] = []

    class Asked(Spool):
        def drain(self, seconds: float) -> bool:
            asked.append(self)
            return super().drain(seconds)

    once = iter([True])  # as the spool begins; then the server is away again
    monkeypatch.setattr(spool, "answers", lambda uri: next(once, False))
    monkeypatch.setattr(tracking, "Spool", Asked)
    for name in ("_client", "connect"):
        monkeypatch.setattr(tracking, name, lambda uri: Server())
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.05)
    with pytest.raises(
        InputError, match=r"^MLflow at http://h: went away again; 1 writes are kept; the same command goes on$"
    ):
        tracking.open_part(home=tmp_path, uri="http://h", experiment="e", part="search", run_tags={}, metric="val_rmse")
    (writer,) = asked
    writer._thread.join(10)
    assert not writer._thread.is_alive()


def test_a_write_that_the_server_refuses_is_raised(tmp_path: Path, there: dict[str, bool]) -> None:
    to = Server()
    to.fail = 99
    writer = opened(to, tmp_path)
    writer.set_tag("r1", "a", "b")
    with pytest.raises(RuntimeError, match="no"):
        writer.drain(10)
    with pytest.raises(RuntimeError, match="no"):
        writer.set_tag("r1", "a", "b")


def test_a_write_that_fails_is_tried_again(tmp_path: Path, there: dict[str, bool]) -> None:
    to = Server()
    to.fail = 2
    writer = opened(to, tmp_path)
    writer.set_tag("r1", "a", "b")
    writer.delete_tag("r1", "a")
    assert writer.close(10)
    assert to.calls == [("set_tag", "r1", "a", "b"), ("delete_tag", "r1", "a")]


def test_a_run_whose_making_was_answered_to_nobody_is_found_again(tmp_path: Path, there: dict[str, bool]) -> None:
    """By the id of the write: a trial may have other runs."""
    to = Server()
    to.runs = [SimpleNamespace(info=SimpleNamespace(run_id="r7"))]
    writer = opened(to, tmp_path)
    there["answers"] = False
    run_id = writer.create_run("1", run_name="n", tags={tags.TRIAL: "t"}).info.run_id
    writer.set_tag(run_id, "a", "b")
    assert not writer.close(0.05)
    there["answers"] = True
    assert opened(to, tmp_path).close(10)
    assert to.calls == [
        ("search_runs", ["1"], f"tags.`study.write` = '{run_id}'"),
        ("set_tag", "r7", "a", "b"),
    ], "none is made a second time"


def test_a_tag_that_is_gone_already_is_removed(tmp_path: Path, there: dict[str, bool]) -> None:
    """The answer to the first try was lost."""
    to = Server()
    to.error = MlflowException("No tag with name a", error_code=RESOURCE_DOES_NOT_EXIST)
    writer = opened(to, tmp_path)
    writer.delete_tag("r1", "a")
    assert writer.close(10)


def test_a_server_that_asks_for_a_password_gets_the_one_of_its_address() -> None:
    asked: list[str | None] = []

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Guarded) as guarded:
        threading.Thread(target=guarded.serve_forever, daemon=True).start()
        try:
            host = f"127.0.0.1:{guarded.server_port}"
            assert answers(f"http://me:s%2Fcret@{host}/")
            assert answers(f"http://{host}")
        finally:
            guarded.shutdown()
    assert asked == [f"Basic {base64.b64encode(b'me:s/cret').decode()}", None]


def test_no_message_shows_the_password_of_a_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^MLflow at http://me@127\.0\.0\.1:9: does not answer"):
        Spool(Server(), "http://me:secret@127.0.0.1:9", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^MLflow at http://me@127\.0\.0\.1:9: does not answer"):
        tracking.connect("http://me:secret@127.0.0.1:9")


def test_a_database_that_does_not_answer_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    told = r"^MLflow at postgresql\+psycopg://me@127\.0\.0\.1:9/runs: cannot be used \(.*refused.*\); start the database or"
    with pytest.raises(InputError, match=told):
        tracking.connect("postgresql+psycopg://me:secret@127.0.0.1:9/runs")
    assert capfd.readouterr() == ("", ""), "and MLflow's own warnings are not on the terminal"
