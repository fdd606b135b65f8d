"""SSCDR of sequences: losses by hand, ranking by distance, and a rotation that is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.models import sscdr_sequences
from trainables.models.sscdr_sequences import SSCDR, WIDTH, Config, Loss, onto_ball, squared_distance
from trainables.sequences.losses import step
from trainables.sequences.views import within
from trainables.tasks.sequential import Sequences, SequenceTask


def spaces(task: SequenceTask, rotated: bool = False) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    source = onto_ball(torch.randn(len(task.train), WIDTH, generator=draw) / 8)
    turn, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw))
    target = source @ turn if rotated else onto_ball(torch.randn(len(task.train), WIDTH, generator=draw) / 8)
    items = onto_ball(torch.randn(task.items, WIDTH, generator=draw) / 8)
    return {"source": source, "target": target, "item": items}


def network(task: SequenceTask, **changes: Any) -> SSCDR:
    torch.manual_seed(0)
    return SSCDR.of_task(Config(**changes), task, spaces(task)).eval()


def test_the_ball_and_the_distance() -> None:
    assert onto_ball(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])  # not (0.12, 0.16)
    assert onto_ball(torch.tensor([0.3, 0.4])).tolist() == pytest.approx([0.3, 0.4])
    assert float(squared_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) == 2
    near, far = (
        squared_distance(torch.tensor(v), torch.tensor([0.0, 1.0])) for v in ([0.0, 1.0], [0.0, 0.5])
    )  # fmt: skip
    assert float((1 + near - far).clamp(min=0)) == pytest.approx(0.75)


@torch.no_grad()
def test_a_product_ranks_as_the_distance_does(task: SequenceTask) -> None:
    model = network(task)
    item = torch.cat(
        [torch.arange(task.source[0], task.source[0] + 3), torch.arange(task.target[0], task.target[0] + 2)]
    )
    user = model.users(Sequences(item, torch.tensor([0, 5])), task.target)[0]
    place = user[:-1] / 2
    score = model.items(task.target) @ user
    distance = squared_distance(model.item[task.target[0] : task.target[1]], place)
    torch.testing.assert_close(score, -distance + place.square().sum(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("hop2", [0.0, 0.5])
def test_a_user_is_placed_by_what_is_near(task: SequenceTask, hop2: float) -> None:
    model = network(task, hop2=hop2, own=2.0)
    chosen = [task.source[0], task.source[0] + 1, task.target[0] + 4]
    user = model.users(Sequences(torch.tensor(chosen), torch.tensor([0, 3])), task.target)[0]
    total = model.mapped(model.item[torch.tensor(chosen[:2])]).mean(dim=0) + 2.0 * model.item[chosen[2]]
    weight = 3.0
    if hop2:
        vectors = []
        for row in range(len(task.train)):
            own = task.train.item[int(task.train.starts[row]) : int(task.train.starts[row + 1])].tolist()
            has = any(task.target[0] <= item < task.target[1] for item in own)
            place = model.neighbour[row] if has else model.mapped(model.source_user[row])
            vectors += [place] * len(set(own) & set(chosen[:2]))
        total, weight = total + hop2 * torch.stack(vectors).mean(dim=0), weight + hop2
    torch.testing.assert_close(user[:-1] / 2, onto_ball(total / weight), atol=1e-5, rtol=1e-5)


def test_the_loss_by_hand(task: SequenceTask) -> None:
    model, config = network(task, weight=0.4), Config(weight=0.4)
    made = Loss(config, task, np.random.default_rng(3))
    users = made.users[:5]
    with torch.no_grad():
        found = float(made(model, users))
    draw, wanted = np.random.default_rng(3), 0.0
    source = within(task.train, task.source)
    which = draw.integers(source.lengths[users].numpy())
    items = source.item[source.starts[users] + torch.from_numpy(which)]
    others = made.unseen.draw(users, items, 1, draw)[:, 0]
    with torch.no_grad():
        for user, item, other in zip(users.tolist(), items.tolist(), others.tolist(), strict=True):
            place = model.neighbour[user]
            wanted += float(squared_distance(model.mapped(model.source_user[user]), place)) / 5
            near, far = (float(squared_distance(model.mapped(model.item[k]), place)) for k in (item, other))
            wanted += 0.4 * max(0.0, 1.0 + near - far) / 5
            assert other not in source.item[int(source.starts[user]) : int(source.starts[user + 1])]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_rotation_between_the_spaces_is_learned(task: SequenceTask) -> None:
    torch.manual_seed(0)
    config = Config(weight=0.0, hidden=256)
    model = SSCDR.of_task(config, task, spaces(task, rotated=True))
    optimiser, made = torch.optim.Adam(model.parameters(), lr=1e-2), Loss(config, task, np.random.default_rng(0))
    losses = [step(optimiser, made(model, made.users)) for _ in range(300)]
    assert losses[0] > 0.3
    assert losses[-1] < 0.01


def test_in_a_learned_space_users_are_near_what_they_chose(task: SequenceTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sscdr_sequences, "SPACE_LR", 1e-2)
    learned = sscdr_sequences.spaces_of(task, 21)
    users, items = torch.cat([learned["source"], learned["target"]]), learned["item"]
    assert float(users.norm(dim=1).max()) <= 1 + 1e-5
    in_target = (task.train.item >= task.target[0]) & (task.train.item < task.target[1])
    rows = task.train.row + len(task.train) * in_target
    own = squared_distance(users[rows], items[task.train.item])
    other = squared_distance(users[rows], items[task.train.item.roll(17)])
    assert float(own.mean()) < 0.6 * float(other.mean())


def test_both_directions_share_the_spaces(task: SequenceTask, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, turned = sscdr_sequences.spaces_of(task, 22), task.turned()
    monkeypatch.setattr("trainables.pretraining.pretrain", pytest.fail)
    found = sscdr_sequences.spaces_of(turned, 22)
    for name, same in (("source", "target"), ("target", "source"), ("item", "item")):
        assert torch.equal(found[name], learned[same])
    for name, domain in (("source", task.source), ("target", task.target)):
        has = within(task.train, domain).lengths > 0
        assert (learned[name].norm(dim=1) > 0).tolist() == has.tolist(), "nobody has a place where they have no item"
    assert sscdr_sequences.shared(Config(), task, [22]) == sscdr_sequences.shared(Config(), turned, [22])


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(margin=0.0, supervised=False, weight=0.0, hidden=0)
    for line in (
        "margin is 0.0; give a number above 0",
        "supervised is false and weight is 0; nothing is learned",
        "hidden is 0; give a number of at least 1",
    ):
        assert line in str(fault.value)
