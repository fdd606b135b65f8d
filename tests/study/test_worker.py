"""How often a trial speaks to its driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.utils.util import flatten_dict

from study.searcher import JobScheduler
from study.tracking import EpochReport
from study.worker import Outbox


@pytest.mark.parametrize(("answer_s", "gap_s"), [(0.0, 1.0), (0.02, 1.0), (3.0, 30.0)])
def test_a_driver_that_is_slow_to_answer_is_asked_less_often(
    answer_s: float, gap_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of a second: each is sent by itself, or together with those that passed since the driver's last answer."""
    now = 0.0
    monkeypatch.setattr("study.worker.time.monotonic", lambda: now)
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
    monkeypatch.setattr("study.worker.time.monotonic", lambda: now)
    sent: list[float] = []
    outbox = Outbox(lambda message: sent.append(now))
    for number in range(2000):
        now += 1.0
        outbox.add((number, {}, False, {}, 0))
    assert {later - before for before, later in zip(sent[-50:-1], sent[-49:], strict=True)} == {10.0}


def test_the_result_says_where_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.worker.device", lambda: "x86_64, H100")
    monkeypatch.setattr("study.worker.versions", lambda: "python=3 torch=2")
    found: list[EpochReport] = []

    def report(job: str, epochs: list[EpochReport]) -> bool:
        found.extend(epochs)
        return False

    scheduler = JobScheduler(SimpleNamespace(job=lambda trial_id: "job"), SimpleNamespace(report=report))  # type: ignore[arg-type]
    trial: Any = SimpleNamespace(trial_id="t")
    outbox = Outbox(lambda message: scheduler.on_trial_result(None, trial, flatten_dict(message)))
    for number, final in ((1, False), (2, True)):
        outbox.add((number, {"val_rmse": 1.0}, final, {}, 0))
        outbox.send()
    assert [dict(epoch.tags) for epoch in found] == [
        {}, {"study.device": "x86_64, H100", "study.versions": "python=3 torch=2"},
    ]  # fmt: skip
