"""The reconstruction of UCLR: its decomposition, temperatures and low-rank tuning against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.interface import Epoch, Setup, Stage
from trainables.models import uclr
from trainables.models.uclr import UCLR, WIDTH, Config, Recovered, Temperatures, Trainer, global_items, train
from trainables.sequences.views import Bag
from trainables.tasks.sequential import SequenceTask


def dense(task: SequenceTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix = np.zeros((len(task.train), task.items))
    matrix[task.train.row.numpy(), task.train.item.numpy()] = 1
    users, items = matrix.sum(1), matrix.sum(0)
    return matrix / np.sqrt(users)[:, None] / np.sqrt(np.maximum(items, 1)), users, items


def test_a_training_user_gets_its_part_of_the_decomposition(task: SequenceTask) -> None:
    matrix, users, _ = dense(task)
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    assert s[0] == pytest.approx(1.0)
    np.testing.assert_allclose(np.abs(u[:, 0]), np.sqrt(users / users.sum()), atol=1e-8)
    vector = global_items(task, 0).double().numpy()
    found = np.stack(
        [
            vector[task.train.item[int(task.train.starts[row]) : int(task.train.starts[row + 1])]].sum(0)
            / math.sqrt(users[row])
            for row in range(len(task.train))
        ]
    )
    rank = min(WIDTH, *matrix.shape)
    wanted = u[:, :rank] * np.sqrt(s[:rank]) * math.sqrt(len(matrix))
    leading = slice(0, 8)  # those that close singular values do not mix
    np.testing.assert_allclose(np.abs(found[:, leading]), np.abs(wanted[:, leading]), atol=2e-2)


@pytest.mark.parametrize(("rho", "best"), [(0.3, 1.0697), (0.5, 0.6704)])
def test_the_best_temperature_of_two_negatives(rho: float, best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences of +1 and -1: log cosh(1 / tau) - tanh(1 / tau) / tau + rho is 0 there."""
    monkeypatch.setattr(uclr, "MOST", 9.0)
    one = torch.zeros(3, WIDTH)
    one[:, 0] = 1.0
    other = torch.zeros(3, WIDTH)
    other[0, 1] = other[1, 0] = 1.0  # similarities 0 (its own), +1 and -1
    other[2, 0] = -1.0
    for start, falls in ((best * 1.2, True), (best * 0.8, False)):
        kept = Temperatures(3, Config(rho=rho), one.device)
        kept.state["temperature"].fill_(start)
        kept.loss(torch.arange(3), one, other, 0)
        assert (float(kept.state["temperature"][0]) < start) is falls
        gradient = float(kept.state["gradient"][0]) / (1 - uclr.MOMENTUM)
        wanted = math.log(math.cosh(1 / start)) - math.tanh(1 / start) / start + rho
        assert gradient == pytest.approx(wanted, abs=1e-5)


def test_equal_differences_bring_the_temperature_to_its_bound() -> None:
    one = torch.zeros(4, WIDTH)
    one[:, 0] = 1.0
    kept = Temperatures(4, Config(rho=0.3), one.device)
    for _ in range(80):
        kept.loss(torch.arange(4), one, one, 0)
    assert float(kept.state["gradient"][0]) == pytest.approx(0.3, abs=1e-3)
    assert kept.state["temperature"].tolist() == pytest.approx([uclr.LEAST] * 4)


def test_the_gradient_of_the_contrast_is_that_of_the_log_of_the_mean() -> None:
    """With the average of this batch alone, iSogCLR's estimator is the gradient of tau log mean exp(d / tau)."""
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(5, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, WIDTH, generator=draw, dtype=torch.float64)
    kept = Temperatures(5, Config(individual=False), torch.device("cpu"))
    kept.state = {name: value.double() for name, value in kept.state.items()}
    kept.loss(torch.arange(5), one, other, 0).backward()  # type: ignore[no-untyped-call]
    assert one.grad is not None
    found, one.grad = one.grad.clone(), None
    normal = torch.nn.functional.normalize
    similarity = normal(one, dim=1) @ normal(other, dim=1).T
    value = torch.zeros((), dtype=torch.float64)
    for user in range(5):
        others = [w for w in range(5) if w != user]
        difference = (similarity[user, others] - similarity[user, user]) / uclr.TEMPERATURE
        value = value + uclr.TEMPERATURE * (difference.exp().mean()).log() / 5
    value.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, one.grad, atol=1e-10, rtol=1e-6)


@torch.no_grad()
def test_low_rank_tuning_starts_at_the_scores_of_the_autoencoder(task: SequenceTask) -> None:
    torch.manual_seed(0)
    model = UCLR(Config(), global_items(task, 0), task.source, task.target).eval()
    before = model.users(task.validation.history, task.target) @ model.items(task.target).T
    assert model.item.rows().equal(model.item.weight)
    model.item.left.fill_(0.1)
    after = model.users(task.validation.history, task.target) @ model.items(task.target).T
    assert not after.equal(before)
    wanted = model.item.weight + 16 / 8 * model.item.left @ model.item.right
    torch.testing.assert_close(model.item.rows(), wanted)


def test_the_fine_tuning_moves_low_rank_parts_alone(task: SequenceTask) -> None:
    torch.manual_seed(0)
    places = train(Config(stage_epochs=1, batch=64, negatives=20), task, 0)
    setup = next(places)
    assert isinstance(setup, Setup)
    assert isinstance(next(places), Stage)
    staged = {name: value.clone() for name, value in setup.network.state_dict().items()}
    assert isinstance(next(places), Epoch)
    moved = {name for name, value in setup.network.state_dict().items() if not value.equal(staged[name])}
    assert moved
    assert all(name == "bias" or name.endswith((".left", ".right")) for name in moved)


def test_users_are_tied_in_the_domains_of_which_the_streams_read_something(task: SequenceTask) -> None:
    """At a high dropout many a domain is left without an item: such a user is in no contrast of it."""
    torch.manual_seed(0)
    config = Config(dropout=0.7, negatives=20)
    model = UCLR(config, global_items(task, 0), task.source, task.target)
    trainer, tied = Trainer(config, task, np.random.default_rng(0)), []

    def loss(user_B: torch.Tensor, one_BD: torch.Tensor, other_BD: torch.Tensor, kind: int) -> torch.Tensor:
        tied.append(len(user_B))
        for vectors in (one_BD, other_BD):
            assert (vectors.norm(dim=1) > 0).all()
        return one_BD.sum()

    trainer.temperatures.loss = loss  # type: ignore[method-assign]
    trainer.autoencoder(model, torch.arange(len(task.train)))
    present = [int((part.lengths > 0).sum()) for part in (trainer.halves.source, trainer.halves.target)]
    assert [0 < tied[2 * domain] < present[domain] for domain in range(2)] == [True, True]


@torch.no_grad()
def test_streams_by_hand(task: SequenceTask) -> None:
    torch.manual_seed(0)
    model = UCLR(Config(), global_items(task, 0), task.source, task.target).eval()
    items = torch.tensor([task.target[0], task.target[0] + 3])
    bag = Bag(items[None], torch.ones(1, 2, dtype=torch.bool))
    none = Bag(items[None], torch.zeros(1, 2, dtype=torch.bool))
    g = model.global_item[items].sum(dim=0) / math.sqrt(2)
    wanted = model.outer.weight @ (model.inner.weight @ g + model.inner_bias).tanh()
    torch.testing.assert_close(model.global_user([none, bag])[0], wanted, atol=1e-5, rtol=1e-5)
    own = model.own[1].weight @ (model.item.weight[items].sum(dim=0) / math.sqrt(2) + model.own_bias[1]).tanh()
    torch.testing.assert_close(model.own_user(bag, 1, model.item.weight)[0], own, atol=1e-5, rtol=1e-5)
    assert model.own_user(none, 1, model.item.weight).abs().max() == 0


def test_items_are_recovered_among_drawn_ones_that_the_user_has_not() -> None:
    """A loop over users and their items, in double precision; items 3 and 7 are drawn, one of them twice."""
    torch.manual_seed(0)
    table = torch.randn(12, 5, dtype=torch.float64)
    item, length = torch.tensor([[1, 3, 7], [2, 0, 0], [0, 0, 0]]), torch.tensor([3, 1, 0])
    bag = Bag(item, torch.arange(3) < length[:, None])
    drawn, user = torch.tensor([7, 4, 3, 7, 11]), torch.randn(3, 4, dtype=torch.float64)
    losses = []
    for row, items in ((0, [1, 3, 7]), (1, [2])):
        vector = torch.cat([user[row], torch.ones(1, dtype=torch.float64)])
        others = [float(table[k] @ vector) + math.log(40 / 5) for k in drawn.tolist() if k not in items]
        scores = [float(table[item] @ vector) for item in items]
        each = [math.log(math.exp(score) + sum(map(math.exp, others))) - score for score in scores]
        losses.append(sum(each) / len(each))
    found = Recovered(bag, table[bag.item[bag.real]], drawn, table[drawn], 40)(user)
    assert float(found) == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(tuning="some", rho=-1.0, rank=0)
    for line in (
        "tuning is 'some'; choose from lora, full, none",
        "rho is -1.0; give a number of at least 0",
        "rank is 0; give a number of at least 1",
    ):
        assert line in str(fault.value)
