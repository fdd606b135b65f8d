"""How often a trial speaks to its driver, and what it says of the node that it ran on."""

from __future__ import annotations

import errno
import os
import pickle
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import tune
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.tune.utils.util import flatten_dict

from study.engine import node_cache, worker
from study.engine.ray_tune import JobScheduler
from study.engine.worker import NodeError, Outbox, train
from study.tracking import tags
from study.tracking.runs import EpochReport


@pytest.mark.parametrize(("answer_s", "gap_s"), [(0.0, 1.0), (0.02, 1.0), (3.0, 30.0)])
def test_a_driver_that_is_slow_to_answer_is_asked_less_often(
    answer_s: float, gap_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of a second: each is sent by itself, or together with those that passed since the driver's last answer."""
    now = 0.0
    monkeypatch.setattr("study.engine.worker.time.monotonic", lambda: now)
    began, ended, epochs = [], [0.0], []

    def send(message: dict[str, list[tuple[int]]]) -> None:
        nonlocal now
        began.append(now)
        epochs.extend(epoch[0] for epoch in message["epochs"])
        now += answer_s
        ended.append(now)

    outbox = Outbox(send)  # type: ignore[arg-type]
    for number in range(100):
        now += 1.0
        outbox.add((number, {}, False, {}, 0))
    outbox.send()
    gaps = [later - before for before, later in zip(ended[1:], began[1:-1], strict=False)]
    assert min(gaps) == pytest.approx(gap_s)
    assert epochs == list(range(100)), "none is left out"


def test_long_trials_speak_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("study.engine.worker.time.monotonic", lambda: now)
    sent: list[float] = []
    outbox = Outbox(lambda message: sent.append(now))
    for number in range(2000):
        now += 1.0
        outbox.add((number, {}, False, {}, 0))
    assert {later - before for before, later in zip(sent[-50:-1], sent[-49:], strict=True)} == {10.0}


HOST = socket.gethostname()
FULL = OSError(errno.ENOSPC, "No space left on device", "/home/a.pt")


def remote(cause: Exception) -> Exception:
    """What `ray.get` raises where the server has raised `cause`, after its way here."""
    return pickle.loads(pickle.dumps(RayTaskError("keep", "", cause))).as_instanceof_cause()


def server_that(error: Exception) -> Any:
    def raises(*_: Any) -> None:
        raise error

    return SimpleNamespace(pack=SimpleNamespace(remote=raises), keep=SimpleNamespace(remote=raises))


def payload(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "trainable": "builtins:iter", "model": "baseline", "config": {}, "task_dir": str(folder / "home"),
        "seeds": [0], "test_dir": None, "rows": False, "metrics": [], "threads": 1, "device": "cpu", "gpus": 0,
        "checkpoint": {"path": str(folder / "a.pt"), "identity": "this", "seconds": 0}, **more,
    }  # fmt: skip


@pytest.fixture
def messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trials report, on a node that does not see `home`."""
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", reported.append)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return reported


@pytest.mark.parametrize(
    "error", [ActorDiedError(), ObjectLostError("ab", "", ""), remote(PermissionError(13, "Permission denied", "/home/a"))],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_fails_between_node_and_home_is_not_the_trial_s_failure(
    error: Exception, messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(NodeError, match=f"^{HOST}: ") as raised:
        train({"payload": payload(tmp_path)}, server_that(error))
    assert raised.value.__cause__ is error
    assert messages == []


def test_a_result_that_cannot_be_returned_is_not_the_trial_s_failure(
    messages: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> Any:
        yield SimpleNamespace(metrics={}, final=True, epoch=1, artifacts={}, state=None, caught_up=False)

    def bring_home(*_: Any) -> None:
        raise ActorDiedError

    monkeypatch.setattr(worker, "resolve", lambda path: run)
    monkeypatch.setattr(worker, "locate", lambda folder, server: node_cache.cached(folder))
    monkeypatch.setattr(worker, "bring_home", bring_home)
    monkeypatch.setattr(worker.trial, "shared", lambda *_: [])
    given = payload(tmp_path, model="lgcd", test_dir=str(tmp_path / "home" / "test"))
    with pytest.raises(NodeError, match=f"^{HOST}: "):
        train({"payload": given}, "server")
    assert messages == []


def test_a_cache_that_cannot_be_written_is_not_the_trial_s_failure(
    messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(NodeError, match=f"^{HOST}: .*Not a directory: '{tmp_path}/cache/study/sent'"):
        train({"payload": payload(tmp_path)}, "never asked")
    assert messages == []


def test_a_full_disk_stops_the_study_and_is_named(
    messages: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train({"payload": payload(tmp_path)}, server_that(remote(FULL)))
    assert messages.pop()["failure"]["full"] == (
        "the node of the driver: [Errno 28] No space left on device: '/home/a.pt'"
    )

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it

    monkeypatch.setattr(node_cache, "_unpack", full)
    monkeypatch.setattr("ray.get", lambda value: value)
    server = SimpleNamespace(pack=SimpleNamespace(remote=lambda folder: ["a reference"]))
    train({"payload": payload(tmp_path)}, server)
    copy = node_cache.cached(tmp_path / "home")
    assert messages.pop()["failure"]["full"] == f"{HOST}: [Errno 28] No space left on device: '{copy}'"


def test_an_error_of_the_training_is_the_trial_s_failure(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    train({"payload": payload(tmp_path, trainable="math:sqrt")})
    (message,) = messages
    assert message["failure"]["reason"].startswith("TypeError: ")
    assert message["failure"]["full"] == ""


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_result_says_what_it_was_trained_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.engine.worker.device", lambda trained_on: f"x86_64 {trained_on}")
    monkeypatch.setattr("study.engine.worker.versions", lambda: "python=3 torch=2")
    reports: list[EpochReport] = []

    def report(job: str, epochs: list[EpochReport]) -> bool:
        reports.extend(epochs)
        return False

    scheduler = JobScheduler(SimpleNamespace(job=lambda trial_id: "job"), SimpleNamespace(report=report))  # type: ignore[arg-type]
    trial: Any = SimpleNamespace(trial_id="t")
    outbox = Outbox(lambda message: scheduler.on_trial_result(None, trial, flatten_dict(message)), kind)
    for number, final in ((1, False), (2, True)):
        outbox.add((number, {"val_rmse": 1.0}, final, {}, 0))
        outbox.send()
    assert [dict(epoch.tags) for epoch in reports] == [
        {}, {tags.DEVICE: f"x86_64 {kind}", tags.VERSIONS: "python=3 torch=2"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "gpus", "shares"), [("cpu", 0, []), ("cpu", 0.25, []), ("cuda", 0.25, [0.25]), ("cuda", 1, [])]
)
def test_the_trainable_is_given_its_device_and_its_share_of_the_memory(
    kind: str, gpus: float, shares: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)

    def run(*_: Any, device: str, **__: Any) -> Any:
        devices.append(device)
        yield SimpleNamespace(metrics={}, final=True, epoch=1, artifacts={}, state=None, caught_up=False)

    monkeypatch.setattr(worker, "resolve", lambda path: run)
    (tmp_path / "home").mkdir()
    worker.run_trial(payload(tmp_path, device=kind, gpus=gpus), Outbox(lambda message: None, kind))
    assert devices == [kind]
    assert given == shares


def test_a_trial_that_ray_stops_is_closed_before_its_process_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises SystemExit out of `tune.report`; what a stopped training leaves is written there, not some time later."""
    closed, kept = [], []

    def run(*_: Any, **__: Any) -> Any:
        try:
            yield SimpleNamespace(metrics={"a": 1.0}, final=False, epoch=1, artifacts={}, state=None, caught_up=False)
        except GeneratorExit:
            closed.append("closed")
            raise

    def resolve(path: str) -> Any:
        return lambda *given, **named: kept.append(run(*given, **named)) or kept[-1]  # type: ignore[func-returns-value]

    def report(message: dict[str, Any]) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(worker, "resolve", resolve)
    monkeypatch.setattr(worker, "pause", lambda age, waited: 0.0)
    (tmp_path / "home").mkdir()
    with pytest.raises(SystemExit):
        worker.run_trial(payload(tmp_path), Outbox(report))
    assert closed == ["closed"], "although something still refers to it"


def test_epochs_that_take_no_time_are_judged_before_one_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come faster than a trial speaks: without this, each trial that they end would train an epoch in vain."""
    done: list[str] = []

    def run(*_: Any, **__: Any) -> Any:
        for epoch in (1, 2, 3):
            replayed = SimpleNamespace(metrics={"a": 1.0}, final=False, epoch=epoch, artifacts={}, state=None)
            replayed.caught_up = epoch == 3
            yield replayed
        done.append("trained")
        yield SimpleNamespace(metrics={"a": 1.0}, final=True, epoch=4, artifacts={}, state=None, caught_up=False)

    monkeypatch.setattr(worker, "resolve", lambda path: run)
    (tmp_path / "home").mkdir()
    outbox = Outbox(lambda message: done.append(str([epoch[0] for epoch in message["epochs"]])))
    worker.run_trial(payload(tmp_path), outbox)
    outbox.send()
    assert done == ["[1, 2, 3]", "trained", "[4]"]


def test_a_trial_without_a_gpu_never_touches_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "get_device_name", "_lazy_init", "device_count", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, touched)
    messages: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", messages.append)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fakes"))
    (tmp_path / "home").mkdir()
    config = {"x": 0.5, "epochs": 1, "seconds": 0.0, "fail": ""}
    train({"payload": payload(tmp_path, trainable="fake_trial:run", config=config)})
    assert [message["failure"] for message in messages] == [None]
    assert messages[-1]["tags"][tags.DEVICE].startswith("x86_64")
