"""Training that trials share: kept once, and not begun anew after a kill."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainables.interface import load_model, make_config
from trainables.pretraining import folder_of, kept_once, pretrain
from trainables.tasks.sequential import SequenceTask


class StoppedError(Exception):
    pass


def trained(task: SequenceTask, kept: Path, stop_after: int = 99) -> dict[str, Tensor]:
    ran: list[int] = []

    def epoch(network: nn.Module, optimiser: Any, rng: np.random.Generator) -> None:
        if len(ran) == stop_after:
            raise StoppedError
        ran.append(1)
        loss = (network(torch.randn(4, 3)) * float(rng.random())).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return pretrain(lambda: nn.Linear(3, 2), epoch, epochs=4, lr=0.1, seed=0, task=task, kept=kept)


@pytest.mark.parametrize("done", [1, 3])
def test_a_kill_costs_the_epoch_under_way(task: SequenceTask, tmp_path: Path, done: int) -> None:
    whole = trained(task, tmp_path / "one.pt")
    with pytest.raises(StoppedError):
        trained(task, tmp_path / "two.pt", stop_after=done)
    for name, value in trained(task, tmp_path / "two.pt").items():
        assert value.equal(whole[name])


def test_a_damaged_file_is_begun_anew(task: SequenceTask, tmp_path: Path) -> None:
    whole = trained(task, tmp_path / "one.pt")
    kept = tmp_path / "two.pt"
    with pytest.raises(StoppedError):
        trained(task, kept, stop_after=2)
    kept.write_bytes(kept.read_bytes()[:200])
    assert all(value.equal(whole[name]) for name, value in trained(task, kept).items())


def test_adam_has_the_betas_that_are_asked_for(task: SequenceTask, tmp_path: Path) -> None:
    found = []

    def epoch(network: nn.Module, optimiser: Any, rng: np.random.Generator) -> None:
        found.append(optimiser.defaults["betas"])

    common: dict[str, Any] = {"epochs": 1, "lr": 0.1, "seed": 0, "task": task}
    pretrain(lambda: nn.Linear(3, 2), epoch, kept=tmp_path / "one.pt", **common)
    pretrain(lambda: nn.Linear(3, 2), epoch, kept=tmp_path / "two.pt", betas=(0.9, 0.98), **common)
    assert found == [(0.9, 0.999), (0.9, 0.98)]


def test_of_several_that_ask_at_once_one_makes_it(task: SequenceTask) -> None:
    made, got, together = [], [], threading.Barrier(4)

    def make(kept: Path) -> dict[str, Any]:
        made.append(1)
        return {"x": torch.arange(3)}

    def ask() -> None:
        together.wait()
        got.append(kept_once(task, "asked", {"seed": 5}, make)["x"].tolist())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, got) == ([1], [[0, 1, 2]] * 4)
    assert (task.folder.parent.parent / folder_of("asked", {"seed": 5}) / "manifest.json").is_file()
    assert folder_of("asked", {"seed": 5}) != folder_of("asked", {"seed": 6})


@pytest.mark.parametrize("name", ["lgcd", "llmcdsr", "plcr", "sscdr_sequences", "tri_cdr", "uclr"])
def test_both_directions_share_what_is_made_ahead_of_trials(
    task: SequenceTask, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.models.tri_cdr.ENCODER_EPOCHS", 1)
    monkeypatch.setattr("trainables.models.plcr.READER_EPOCHS", 1)
    monkeypatch.setattr("trainables.models.llmcdsr.TEXT_EPOCHS", 1)
    monkeypatch.setattr("trainables.models.sscdr_sequences.SPACE_EPOCHS", 1)
    model = load_model(name)
    config = make_config(name, {"encoder_epochs": 1} if name == "lgcd" else {}, "here")
    assert model.prepare is not None
    assert model.shared is not None
    made = {}
    for first in ("one", "other"):
        here = replace(task, folder=tmp_path / first / "tasks" / "cell" / "search")
        ways = (here, here.turned()) if first == "one" else (here.turned(), here)
        assert model.shared(config, ways[0], [3]) == model.shared(config, ways[1], [3])
        model.prepare(config, ways[0], [3])
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        model.prepare(config, ways[1], [3])
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        folders = [tmp_path / first / "tasks" / folder for folder in model.shared(config, here, [3])]
        (state,) = (path for folder in folders for path in folder.glob("*.pt"))
        made[first] = torch.load(state, weights_only=True)
    assert made["one"].keys() == made["other"].keys()
    assert all(value.equal(made["other"][key]) for key, value in made["one"].items())
