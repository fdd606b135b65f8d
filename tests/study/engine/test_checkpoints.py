"""Checkpoints of trials: written whole, read without pickle, of use for the same work alone."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from study.engine.checkpoints import CheckpointWriter, checkpoint_path, read_checkpoint
from study.engine.worker import Outbox, run_trial

EPOCHS = [(1, {"val_rmse": 1.5}, False, {}, 1001), (2, {"val_rmse": 1.25}, False, {}, 1002)]


def write(path: Path, identity: str = "this", seconds: float = 0) -> None:
    CheckpointWriter(path, identity, seconds).offer(lambda: {"weights": torch.arange(3.0), "epoch": 2}, EPOCHS)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pt"
    write(path)
    checkpoint = read_checkpoint(path, "this")
    assert checkpoint is not None
    assert list(checkpoint.epochs) == EPOCHS
    assert checkpoint.state["weights"].tolist() == [0, 1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]


def test_another_work_s_or_half_a_file_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert read_checkpoint(path, "this") is None
    write(path, "that")
    assert read_checkpoint(path, "this") is None
    write(path)
    whole = path.read_bytes()
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read_checkpoint(path, "this") is None, end


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_checkpoint_is_not_run(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save({"identity": "this", "state": Evil(), "epochs": []}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt", "this") is None
    assert not Path("was-run").exists()


def test_the_interval_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", seconds=1000)
    assert not (tmp_path / "a.pt").exists()


def test_a_full_disk_costs_the_checkpoint_and_not_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()

    def full(document: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    write(tmp_path / "a.pt")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.pt": before}


def test_a_path_is_made_of_no_name(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, "study", "search/../../etc/passwd@0.2/0000")
    assert path.parent == tmp_path / "checkpoints" / "study"
    assert path.stem.isalnum()
    assert path != checkpoint_path(tmp_path, "study", "search/../../etc/passwd@0.2/0001")


def test_a_trial_goes_on_and_sends_its_epochs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fakes"))
    payload = {
        "trainable": "fake_trial:run", "model": "fake", "task_dir": str(tmp_path), "seeds": (0,), "test_dir": None,
        "rows": False, "metrics": ["val_rmse"], "threads": 1, "device": "cpu", "gpus": 0,
        "config": {"x": 0.5, "epochs": 4, "seconds": 0.0, "fail": "raise"},
        "checkpoint": {"path": str(tmp_path / "a.pt"), "identity": "this", "seconds": 0},
    }  # fmt: skip
    write(tmp_path / "a.pt")
    sent: list[dict[str, Any]] = []
    with pytest.raises(ValueError, match="the data set"):
        run_trial(payload, Outbox(sent.append))
    payload["config"] = {"x": 0.5, "epochs": 4, "seconds": 0.0, "fail": ""}
    sent.clear()
    outbox = Outbox(sent.append)
    run_trial(payload, outbox)
    outbox.send()
    epochs = [epoch for message in sent for epoch in message["epochs"]]
    assert [(epoch, final) for epoch, _, final, _, _ in epochs] == [
        (1, False), (2, False), (3, False), (4, False), (4, True),
    ]  # fmt: skip
    assert epochs[:2] == EPOCHS
    assert [line.split()[1] for line in (tmp_path / "epochs.txt").read_text().splitlines()] == ["3", "4"]
    checkpoint = read_checkpoint(tmp_path / "a.pt", "this")
    assert checkpoint is not None
    assert checkpoint.state == {"epoch": 4}


STAGED = """
from trainables.trial import Report

def run(model, config, task_dir, seeds, test_dir=None, rows=False, device="cpu", state=None):
    for place in range(state["place"] + 1 if state else 0, 3):
        yield Report(epoch=0, metrics={}, state=lambda place=place: {"place": place})
        if place == config["dies_at"]:
            raise KeyboardInterrupt
    yield Report(epoch=1, metrics={"val_rmse": float(place)}, final=True)
"""


def test_a_report_without_metrics_is_written_and_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "staged_trial.py").write_text(STAGED)
    monkeypatch.syspath_prepend(str(tmp_path))
    payload = {
        "trainable": "staged_trial:run", "model": "", "task_dir": "", "seeds": (0,), "test_dir": None, "rows": False,
        "metrics": ["val_rmse"], "threads": 1, "device": "cpu", "gpus": 0, "config": {"dies_at": 1},
        "checkpoint": {"path": str(tmp_path / "a.pt"), "identity": "this", "seconds": 0},
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run_trial(payload, Outbox(sent.append))
    checkpoint = read_checkpoint(tmp_path / "a.pt", "this")
    assert checkpoint is not None
    assert (checkpoint.state, list(checkpoint.epochs), sent) == ({"place": 1}, [], [])
    outbox = Outbox(sent.append)
    run_trial(payload, outbox)
    outbox.send()
    assert [(epoch, metrics) for message in sent for epoch, metrics, *_ in message["epochs"]] == [
        (1, {"val_rmse": 2.0})
    ]
