"""Writes to a tracking server, in order, kept on disk until the server has taken them.

A server that is away for minutes holds up no trial and costs no metric: writes go to a file and return at once, a
thread sends them. What a dead driver had not sent, the next one sends first. A run has an id of the driver until the
server has given it one.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from features.errors import InputError
from study.tracking import tags
from study.tracking.addresses import without_password

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ANSWER_S = 3.0
"""A server that has not answered by then is away."""
_PAUSE_S = 1.0
_TRIES = 5  # of one write to a server that does answer
_LOCAL = re.compile(r"spooled-[0-9a-f]{32}")


def answers(uri: str) -> bool:
    """Whether a server is there, whatever it answers; a proxy before one that is down answers 502 to 504."""
    address = urlsplit(uri.rstrip("/"))
    user, at, host = address.netloc.rpartition("@")
    ask = urllib.request.Request(address._replace(netloc=host).geturl() + "/health")
    if at:
        ask.add_header("Authorization", f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
    try:
        with urllib.request.urlopen(ask, timeout=ANSWER_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (502, 503, 504)
    except OSError:
        return False


class Spool:
    """Takes the place of an `MlflowClient`, for writing."""

    def __init__(self, client: MlflowClient, uri: str, folder: Path) -> None:
        """Begin with what an earlier driver left in `folder`.

        Raises InputError when the server is away, because nothing can be read from it either.
        """
        self._client, self._uri = client, uri
        folder.mkdir(parents=True, exist_ok=True)
        self._writes, self._sent = folder / "writes.jsonl", folder / "sent.txt"
        writes = _whole_lines(self._writes)
        _refuse_damaged(self._writes, writes)
        taken = [line.partition(" ") for line in _whole_lines(self._sent)]
        self._ids = {local: remote for local, _, remote in taken if remote}
        self._queue = deque(writes[len(taken) :])
        self._repeated = bool(self._queue)  # the first may have arrived, and only the note of it not
        self._changed = threading.Condition()
        self._closing = False
        self._broken: Exception | None = None
        if len(taken) > len(writes):
            raise InputError(f"{self._sent}: notes more writes than {self._writes.name} has; move both files away")
        if not answers(uri):
            raise InputError(
                f"MLflow at {without_password(uri)}: does not answer; {len(self._queue)} writes of an earlier run are "
                f"kept in {folder}; start the server, the same command goes on"
            )
        self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
        self._thread.start()

    # --- MlflowClient's words ---------------------------------------------------------------------------------------

    def create_run(self, experiment_id: str, *, run_name: str, tags: Mapping[str, str]) -> Any:
        """Give the run a local id; the server finds it by the tag with that id, should its answer be lost."""
        local = f"spooled-{uuid.uuid4().hex}"
        self._put("create_run", local, experiment_id, run_name, dict(tags))
        return SimpleNamespace(info=SimpleNamespace(run_id=local))

    def update_run(self, run_id: str, *, status: str) -> None:
        self._put("update_run", run_id, status)

    def set_terminated(self, run_id: str, status: str) -> None:
        self._put("set_terminated", run_id, status, int(time.time() * 1000))

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._put("set_tag", run_id, key, value)

    def delete_tag(self, run_id: str, key: str) -> None:
        self._put("delete_tag", run_id, key)

    def log_batch(
        self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> None:
        numbers = [(metric.key, metric.value, metric.timestamp, metric.step) for metric in metrics]
        words = [[(entry.key, entry.value) for entry in entries] for entries in (params, tags)]
        self._put("log_batch", run_id, numbers, *words)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self._put("log_text", run_id, text, artifact_file)

    def log_artifact(self, run_id: str, local_path: str) -> None:
        path = Path(local_path)
        self._put("log_artifact", run_id, path.name, base64.b64encode(path.read_bytes()).decode())

    # --- keeping and sending ----------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Writes that the server has not taken yet."""
        return len(self._queue)

    def drain(self, seconds: float) -> bool:
        """Wait until all is sent; False when the server was away for that long. Raises what the server refused."""
        end = time.monotonic() + seconds
        with self._changed:
            while self._queue and self._broken is None and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._broken is not None:
                raise self._broken
            return not self._queue

    def close(self, seconds: float) -> bool:
        """`drain`, and `stop`; what is not sent stays on disk for the next driver."""
        try:
            done = self.drain(seconds)
        finally:
            self.stop()
        if done:
            self._thread.join()
            self._writes.unlink(missing_ok=True)
            self._sent.unlink(missing_ok=True)
        return done

    def stop(self) -> None:
        """Send and note no more: the next driver, which may be in this very process, goes on from the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _put(self, what: str, *words: Any) -> None:
        line = json.dumps([what, *words])
        with self._changed:
            if self._broken is not None:
                raise self._broken
            with self._writes.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._queue.append(line)
            self._changed.notify_all()

    def _work(self) -> None:
        tries = 0
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                line = self._queue[0]
            if not answers(self._uri):
                time.sleep(_PAUSE_S)
                continue
            try:
                note = self._send(*json.loads(_LOCAL.sub(lambda match: self._ids.get(match[0], match[0]), line)))
            except Exception as error:
                self._repeated, tries = True, tries + 1
                if tries >= _TRIES:
                    with self._changed:
                        self._broken = error
                        self._changed.notify_all()
                    return
                continue
            self._repeated, tries = False, 0
            with self._changed:
                if self._closing:
                    return  # it has arrived, and the next driver repeats it: see `_repeated`
                with self._sent.open("a", encoding="utf-8") as file:
                    file.write(note + "\n")
                self._queue.popleft()
                self._changed.notify_all()

    def _send(self, what: str, run_id: str, *words: Any) -> str:
        """Send one write; returns the line of `sent.txt`."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        client = self._client
        if what == "create_run":
            remote = self._create(run_id, *words)
            self._ids[run_id] = remote
            return f"{run_id} {remote}"
        if what == "update_run":
            client.update_run(run_id, status=words[0])
        elif what == "set_terminated":
            client.set_terminated(run_id, words[0], end_time=words[1])
        elif what == "log_batch":
            numbers, params, run_tags = words
            client.log_batch(
                run_id, metrics=[Metric(*entry) for entry in numbers], params=[Param(*entry) for entry in params],
                tags=[RunTag(*entry) for entry in run_tags],
            )  # fmt: skip
        elif what == "delete_tag":
            try:
                client.delete_tag(run_id, *words)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it is gone already where an answer was lost
                    raise
        elif what == "log_artifact":
            name, content = words
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / name).write_bytes(base64.b64decode(content))
                client.log_artifact(run_id, str(Path(folder) / name))
        else:
            getattr(client, what)(run_id, *words)
        return "-"

    def _create(self, local: str, experiment_id: str, run_name: str, run_tags: dict[str, str]) -> str:
        """Return the server's id of a new run; of one that is there already where the answer to its making was lost."""
        if self._repeated:
            for run in self._client.search_runs([experiment_id], f"tags.`{tags.WRITE}` = '{local}'"):
                return str(run.info.run_id)
        run_tags = {**run_tags, tags.WRITE: local}
        return str(self._client.create_run(experiment_id, run_name=run_name, tags=run_tags).info.run_id)


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file; half a line at its end, which a killed driver left, is cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return whole.splitlines()


def _refuse_damaged(path: Path, lines: Sequence[str]) -> None:
    """Raise InputError for a line that is no write: what comes after it may be about a run that it made."""
    for number, line in enumerate(lines, start=1):
        try:
            known = isinstance(json.loads(line), list)
        except ValueError:
            known = False
        if not known:
            raise InputError(
                f"{path}:{number}: is damaged; put a copy of the file back, or move it away: the trials of its writes are "
                "then trained again"
            )
