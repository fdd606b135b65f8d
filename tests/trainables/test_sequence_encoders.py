"""Sequence encoders: what a representation depends on, the loss against a full softmax, and that work is shared."""

from __future__ import annotations

import errno
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from tests.trainables.sequence_worlds import make_sequence_task
from trainables.models.lgcd import PRESETS, Config, pretraining
from trainables.models.lgcd.encoders import Encoders, PretrainSpec, represent
from trainables.models.lgcd.pretraining import encoders_folders, pretrain, pretrained, pretraining_loss
from trainables.pretraining import keep
from trainables.tasks.sequential import SequenceTask, load_task

from .sequence_worlds import histories

QUICK = PretrainSpec(width=8, epochs=2, batch=16, negatives=10, max_length=6)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> SequenceTask:
    return load_task(make_sequence_task(tmp_path_factory.mktemp("world"))[0])


def both(task: SequenceTask) -> tuple[tuple[int, int], ...]:
    return task.source, task.target


def random_encoders(items: int = 12) -> Encoders:
    torch.manual_seed(0)
    return Encoders(QUICK, torch.randn(items, 5)).eval()


def test_a_representation_depends_on_its_own_past_alone() -> None:
    encoders = random_encoders()
    whole = represent(encoders, histories([1, 2, 3, 4, 5]), last=False)
    for length in range(1, 6):
        for full, prefix in zip(
            whole, represent(encoders, histories([1, 2, 3, 4, 5][:length]), last=True), strict=True
        ):
            torch.testing.assert_close(full[length - 1], prefix[0])


def test_a_representation_does_not_depend_on_its_batch() -> None:
    encoders = random_encoders()
    alone = represent(encoders, histories([3, 1]), last=True)
    beside = represent(encoders, histories([5, 6, 7, 8, 9], [3, 1], []), last=True)
    for one, many in zip(alone, beside, strict=True):
        torch.testing.assert_close(one[0], many[1])
        assert not many[2].any()  # an empty history has the zero vector


def test_only_the_newest_items_are_read() -> None:
    encoders = random_encoders()
    long, cut = histories([9, 8, 1, 2, 3, 4, 5, 6]), histories([1, 2, 3, 4, 5, 6])
    for one, other in zip(represent(encoders, long, last=True), represent(encoders, cut, last=True), strict=True):
        torch.testing.assert_close(one, other)


def test_pretraining_loss_is_that_of_every_position_among_its_own_domain(task: SequenceTask) -> None:
    """One user after the other and item by item, with all items drawn."""
    encoders, rng = Encoders(QUICK, task.titles()).eval(), np.random.default_rng(0)
    rows = [[1, 50, 3], [60, 2], [7, 8, 90]]
    items_BL = torch.tensor([[*row, 0][:3] if len(row) == 2 else row for row in rows])
    real_BL = torch.tensor([[True] * len(row) + [False] * (3 - len(row)) for row in rows])
    losses = []
    for row in rows:
        states = encoders.fuse(*represent(encoders, histories(row), last=False))
        for k, item in enumerate(row[1:]):
            low, high = task.source if item < task.source[1] else task.target
            vectors = encoders.fuse_items(*encoders.look_up(torch.arange(low, high)))
            losses.append(functional.cross_entropy(vectors @ states[k], torch.tensor(item - low)))
    found = pretraining_loss(encoders, both(task), items_BL, real_BL, 40_000, rng)
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=0.02, rtol=0.01)


def test_pretraining_learns(task: SequenceTask, tmp_path: Path) -> None:
    spec = PretrainSpec(width=8, epochs=30, batch=16, negatives=40, max_length=10, dropout=0.0)
    encoders = pretrain(task, spec, 3, tmp_path / "kept.pt", both(task))
    history = task.train
    state = encoders.fuse(*represent(encoders, history, last=False))
    follows = torch.arange(len(history.item) - 1)
    follows = follows[history.row[1:] == history.row[:-1]]
    chance = []
    for low, high in (task.source, task.target):
        inside = follows[(history.item[follows + 1] >= low) & (history.item[follows + 1] < high)]
        logits = state[inside] @ encoders.fuse_items(*encoders.look_up(torch.arange(low, high))).T
        loss = functional.cross_entropy(logits, history.item[inside + 1] - low)
        chance.append(float(loss.detach()) / math.log(high - low))
    assert max(chance) < 0.9  # 1 is what a guess among all items of the domain reaches


def test_the_config_says_how_long_the_optimiser_remembers_squares(task: SequenceTask, tmp_path: Path) -> None:
    """An item that is seen once moves by sum_k 0.9^k (1 - 0.9) / sqrt(1 - beta2) steps, four times as far with 0.999."""
    for preset, beta2 in ((Config(), 0.98), (Config(**PRESETS["paper"]), 0.999)):
        assert preset.pretraining.beta2 == beta2
        spec = replace(preset.pretraining, sequences="merged", epochs=1, negatives=40)
        pretrain(task, spec, 3, kept := tmp_path / f"{beta2}.pt", both(task))
        (group,) = torch.load(kept, weights_only=True)["optimiser"]["param_groups"]
        assert group["betas"] == (0.9, beta2)
    assert len(set(encoders_folders(task, spec, 3) + encoders_folders(task, replace(spec, beta2=0.98), 3))) == 2


def test_pretraining_that_was_killed_goes_on_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(make_sequence_task(tmp_path)[0])
    spec = PretrainSpec(width=8, epochs=3, batch=16, negatives=40, max_length=10)
    whole = pretrain(task, spec, 3, tmp_path / "whole.pt", both(task))
    steps: list[int] = []

    def killed(path: Path, number: int, *rest: Any) -> None:
        keep(path, number, *rest)
        steps.append(number)
        if steps == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr("trainables.models.lgcd.pretraining.keep", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrained(task, spec, 3)
    torch.manual_seed(99)  # another process
    found = pretrained(task, spec, 3).of_domain(task.source)
    assert steps == [1, 2, 3]
    for one, other in zip(whole.state_dict().values(), found.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    (folder,) = (task.folder.parent.parent / "encoders").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "weights.pt"]


def test_a_full_disk_costs_the_kept_state_and_not_the_pretraining(
    task: SequenceTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(task, QUICK, 3, tmp_path / "whole.pt", both(task))

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    found = pretrain(task, QUICK, 3, tmp_path / "full.pt", both(task))
    assert [path.name for path in tmp_path.iterdir()] == ["whole.pt"]
    assert_same(whole, found)

    def unwritable(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "save", unwritable)
    with pytest.raises(PermissionError, match="Permission denied"):
        pretrain(task, QUICK, 3, tmp_path / "full.pt", both(task))
    assert [path.name for path in tmp_path.iterdir()] == ["whole.pt"]


@pytest.mark.parametrize("fault", ["half", "another model", "no generator", "not a state"])
def test_a_kept_state_that_cannot_be_read_is_begun_anew(task: SequenceTask, tmp_path: Path, fault: str) -> None:
    whole = pretrain(task, QUICK, 3, kept := tmp_path / "kept.pt", both(task))
    state = torch.load(kept, weights_only=True)
    if fault == "half":
        kept.write_bytes(kept.read_bytes()[:-100])
    elif fault == "another model":  # found after some of its weights have been read
        state["encoders"].popitem()
        torch.save(state, kept)
    elif fault == "no generator":
        del state["torch"]
        torch.save(state, kept)
    else:
        torch.save([1], kept)
    assert_same(whole, pretrain(task, QUICK, 3, kept, both(task)))


def test_two_processes_do_not_pretrain_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(make_sequence_task(tmp_path)[0])
    made = []

    def pretrain_once(*given: Any) -> Encoders:
        made.append(given)
        time.sleep(0.2)  # the other one has asked by then
        return pretrain(*given)

    monkeypatch.setattr(pretraining, "pretrain", pretrain_once)
    with ThreadPoolExecutor(2) as pool:  # a lock is of an open file, so threads stand for processes
        first, second = pool.map(lambda _: pretrained.__wrapped__(task, QUICK, 0), range(2))
    assert len(made) == 1
    assert_same(*(found.of_domain(task.source) for found in (first, second)))
    (folder,) = (tmp_path / "tasks" / "encoders").iterdir()
    assert [folder.name] == [path.name for path in encoders_folders(task, QUICK, 0)]


def assert_same(one: Encoders, other: Encoders) -> None:
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_separate_pretraining_reads_no_sequence_over_both_domains(task: SequenceTask) -> None:
    separate = pretraining._pretraining_sequences(task, both(task), merged=False)
    boundary = task.target[0]
    for start, end in pairwise(separate.starts):
        assert len({bool(number >= boundary) for number in separate.item[start:end]}) == 1
        assert end - start >= 2
    merged = pretraining._pretraining_sequences(task, both(task), merged=True)
    assert len(merged.item) > len(separate.item)


def test_encoders_are_made_once_for_both_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (load_task(make_sequence_task(tmp_path, direction=way)[0]) for way in ("film-song", "song-film"))
    first = pretrained(one, QUICK, 0)
    monkeypatch.setattr(pretraining, "pretrain", None)  # would fail if it were called again
    second = pretrained(other, QUICK, 0)
    assert_same(first.of_domain(one.source), second.of_domain(one.source))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epochs": 3}, {"sequences": "separate"}, {"id_start": "random"}])
def test_other_encoders_are_made_for_another_spec_or_seed(
    task: SequenceTask, changed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained(task, QUICK, 0)
    made = []
    monkeypatch.setattr(pretraining, "pretrain", lambda *given: made.append(given) or pretrain(*given))
    seed = int(changed.pop("seed", 0))  # type: ignore[call-overload]
    pretrained(task, PretrainSpec(**{**QUICK.__dict__, **changed}), seed)  # type: ignore[arg-type]
    assert len(made) == 1
