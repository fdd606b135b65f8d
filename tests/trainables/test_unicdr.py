"""UniCDR's aggregates, masks and losses against hand counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.models.unicdr import WIDTH, Aggregator, Config, Loss, UniCDR
from trainables.sequences.labels import Halves, training_labels
from trainables.sequences.views import Bag
from trainables.tasks.sequential import Sequences, SequenceTask


def network(config: Config, task: SequenceTask) -> UniCDR:
    torch.manual_seed(0)
    made = UniCDR(config, task.items, len(task.train), task.source, task.target).eval()
    torch.nn.init.normal_(made.item.weight, std=0.5)
    return made


@torch.no_grad()
@pytest.mark.parametrize("mix", [0.2, 0.4, 1.0])
def test_scores_and_discriminators_of_zero_cost_two_logs_of_two(task: SequenceTask, mix: float) -> None:
    config = Config(loss="bce", mix=mix, hide_own=0.0, mask_rate=0.0)
    model = network(config, task)
    model.item.weight.zero_()
    for tie in model.tie:
        tie.weight.zero_()
        tie.bias.zero_()
    made = Loss(config, task, np.random.default_rng(0))
    wanted = 2 * math.log(2)
    assert float(made(model, made.rows(1, made.numbers[1]))) == pytest.approx(wanted, rel=1e-6)


@torch.no_grad()
def test_attention_gives_padding_no_weight_and_order_no_meaning() -> None:
    torch.manual_seed(0)
    pool = Aggregator("attention")
    torch.nn.init.zeros_(pool.query)  # type: ignore[arg-type]
    vectors = torch.randn(10, WIDTH)
    items = Bag(torch.zeros(3, 10, dtype=torch.int64), torch.arange(10) < torch.tensor([[2], [0], [8]])).packed()
    two, none, _ = pool(vectors, items)
    torch.testing.assert_close(two, pool.map(vectors[:2].mean(dim=0)))  # 0.5 each, not 0.1
    assert none.abs().max() == 0
    torch.nn.init.normal_(pool.query)  # type: ignore[arg-type]
    order = torch.cat([torch.randperm(2), 2 + torch.randperm(8)])
    torch.testing.assert_close(pool(vectors[order], items), pool(vectors, items), atol=1e-6, rtol=1e-6)
    weight_N = torch.softmax(pool.key(vectors[2:]).tanh() @ pool.query, dim=0)  # type: ignore[misc, operator]
    torch.testing.assert_close(pool(vectors, items)[2], pool.map(weight_N @ vectors[2:]), atol=1e-6, rtol=1e-6)


def test_no_row_holds_its_label_and_each_holds_what_was_before_it(task: SequenceTask) -> None:
    labels, halves = training_labels(task, "merged"), Halves.of_task(task)
    source, target = halves.before(labels, torch.arange(len(labels)), 50)
    for number in range(len(labels)):
        start, place = int(task.train.starts[labels.row[number]]), int(labels.place[number])
        before = task.train.item[start : start + place].tolist()
        for bag, (low, high) in ((source, task.source), (target, task.target)):
            shown = bag.item[number][bag.real[number]].tolist()
            assert shown == [item for item in before if low <= item < high]
            assert int(labels.item[number]) not in shown


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_the_loss_of_rows_by_hand(task: SequenceTask, kind: str) -> None:
    config = Config(loss=kind, dropout=0.0, mask_rate=0.0, hide_own=0.0, mix=0.7, negatives=3, bce_negatives=3)
    model = network(config, task)
    made = Loss(config, task, np.random.default_rng(5))
    numbers = made.numbers[1][:6]
    found = float(made(model, made.rows(1, numbers)))
    draw: Any = np.random.default_rng(5)
    draw.random(6)
    draw.random(made.halves.before(made.labels, numbers, 10)[1].real.shape)
    if kind == "bce":
        drawn = made.unseen.draw(made.labels.row[numbers], made.labels.item[numbers], 3, draw)
    else:
        drawn = torch.from_numpy(draw.integers(*task.target, 3)).expand(6, 3)
    source, target = made.halves.before(made.labels, numbers, 10)
    own, shared = [], []
    for row in range(6):
        for bag, pool, out in ((target, model.specific[1], own), (source, model.all, shared)):
            items = bag.item[row][bag.real[row]]
            out.append(pool.map(model.item.weight[items].mean(dim=0)) if len(items) else torch.zeros(WIDTH))
    rated = tied = 0.0
    softplus = torch.nn.functional.softplus
    full = [row for row in range(6) if source.real[row].any() and target.real[row].any()]
    for row in range(6):
        user = own[row] + shared[row]
        label = made.labels.item[numbers[row]]
        score = float(user @ model.item.weight[label])
        if kind == "bce":
            rated += math.log1p(math.exp(-score)) / 6
            rated += sum(float(softplus(user @ model.item.weight[k])) for k in drawn[row]) / 18
        else:
            each = (task.target[1] - task.target[0]) / 3
            rest = sum(each * math.exp(float(user @ model.item.weight[k])) for k in drawn[row] if k != label)
            rated += (math.log(math.exp(score) + rest) - score) / 6
    for at, row in enumerate(full):
        other = full[at - 1]
        tied += float(softplus(-model.tie[1](own[row], shared[row]))) / len(full)
        tied += float(softplus(model.tie[1](own[other], shared[row]))) / len(full)
    assert len(full) > 1
    assert found == pytest.approx(0.7 * rated + 0.3 * tied, rel=1e-5)


@torch.no_grad()
def test_under_strict_cold_start_the_shared_vector_alone_ranks(task: SequenceTask) -> None:
    model = network(Config(), task)
    items = torch.arange(task.source[0], task.source[0] + 3)
    user = model.users(Sequences(items, torch.tensor([0, 3])), task.target)[0]
    torch.testing.assert_close(user, model.all.map(model.item.weight[items].mean(dim=0)))


@torch.no_grad()
def test_a_user_of_either_domain_has_a_vector_for_the_other(task: SequenceTask) -> None:
    model = network(Config(), task)
    items = torch.arange(task.target[0], task.target[0] + 3)
    history = Sequences(items, torch.tensor([0, 3]))
    mean = model.item.weight[items].mean(dim=0)
    torch.testing.assert_close(model.users(history, task.source)[0], model.all.map(mean))
    torch.testing.assert_close(model.users(history, task.target)[0], model.all.map(mean) + model.specific[1].map(mean))


@torch.no_grad()
def test_a_held_out_user_is_the_unknown_one(task: SequenceTask) -> None:
    config = Config(id_share=0.5)
    model = network(config, task)
    items = torch.arange(task.source[0], task.source[0] + 3)
    user = model.users(Sequences(items, torch.tensor([0, 3])), task.target)[0]
    assert model.user is not None
    users = len(task.train)
    unknown = model.user.weight[users + 1 + users] + model.user.weight[2 * (users + 1) + users]
    wanted = 0.5 * unknown + 0.5 * model.all.map(model.item.weight[items].mean(dim=0))
    torch.testing.assert_close(user, wanted)


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(aggregator="sum", mix=2.0, specific=False, shared=False, batch=1)
    for line in (
        "aggregator is 'sum'; choose from mean, attention",
        "mix is 2.0; give a number from 0 to 1",
        "specific and shared are both false; a user needs one of them",
        "batch is 1; give a number of at least 2",
    ):
        assert line in str(fault.value)


def test_the_shared_aggregator_reads_the_other_domain_where_there_is_one(task: SequenceTask) -> None:
    """In training; a row that has nothing there reads its own items, and has no contrast of own and shared vector."""
    made = Loss(Config(mask_rate=0.0, hide_own=0.0), task, np.random.default_rng(0))
    rows = made.rows(1, made.numbers[1])
    own_N = (rows.read.item >= task.target[0]) & (rows.read.item < task.target[1])
    reads_own, other = (torch.bincount(rows.read.row[chosen], minlength=rows.read.rows) for chosen in (own_N, ~own_N))
    visible = torch.bincount(rows.visible.row, minlength=rows.visible.rows)
    assert ((other > 0) | (reads_own == visible)).all()
    assert (reads_own[other > 0] == 0).all()
    assert rows.tied_B.equal((other > 0) & (visible > 0))
    assert rows.tied_B.any()
    assert (other == 0).any()
