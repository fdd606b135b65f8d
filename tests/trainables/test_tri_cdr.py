"""Tri-CDR's attention, losses and labels against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from features.errors import InputError
from trainables.models import tri_cdr
from trainables.models.tri_cdr import TAU, WIDTH, Attention, Config, Loss, TriCDR, triplet_loss
from trainables.sequence_tools import Bag, contrast
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask


def network(task: SequenceTask, **changes: Any) -> TriCDR:
    torch.manual_seed(0)
    made = TriCDR(Config(**changes), task.items, task.source, task.target).eval()
    for reader in made.readers:
        torch.nn.init.normal_(reader.item.weight, std=0.3)
    return made


@torch.no_grad()
def test_attention_against_the_concatenation_it_stands_for() -> None:
    """a_i = MLP([h, q, h * q, q - h, m]) by a map of 320, one state after the other; 0 for an empty sequence."""
    torch.manual_seed(0)
    made = Attention().double()
    h, q, m = (torch.randn(size, WIDTH, dtype=torch.float64) for size in (5, 1, 1))
    zero = torch.zeros(80, WIDTH, dtype=torch.float64)
    whole = torch.cat([made.state.weight, made.query.weight, made.product.weight, zero, made.mean.weight], dim=1)
    logits = []
    for state in h[:3]:
        x = torch.cat([state, q[0], state * q[0], q[0] - state, m[0]])
        logits.append(made.rest(whole @ x + made.product.bias))
    wanted = torch.cat(logits).softmax(0) @ h[:3]
    real = torch.arange(5)[None] < 3
    torch.testing.assert_close(made(h[None], real, q, m)[0], wanted, atol=1e-12, rtol=0)
    assert made(h[None], ~torch.ones_like(real), q, m).abs().max() == 0


def test_nt_xent_of_two_users_and_the_triplet() -> None:
    two = torch.eye(2, WIDTH)
    assert float(contrast(two, two, TAU)) == pytest.approx(9.0796e-5, rel=1e-3)
    source = torch.zeros(1, WIDTH)
    mixed, target = source.clone(), source.clone()
    mixed[0, 0], target[0, 0] = 3.0, 1.0
    assert float(triplet_loss(mixed, source, target, 4.0)) == pytest.approx(6.0)


def test_batches_hold_all_labels_of_users_of_both_domains(task: SequenceTask) -> None:
    made = Loss(Config(batch=7), task, np.random.default_rng(0))
    seen: list[int] = []
    for number in made.batches():
        rows = made.labels.row[number]
        assert len(rows.unique()) <= 7
        assert (rows[1:] != rows[:-1]).sum() == len(rows.unique()) - 1  # a user's labels are together
        seen += number.tolist()
    assert sorted(seen) == list(range(len(made.labels)))
    assert (task.group[made.labels.row] == OVERLAPPING).all()
    assert ((made.labels.item >= task.target[0]) & (made.labels.item < task.target[1])).all()


def without_positions(model: TriCDR) -> None:
    """They are counted from the end of what is read: of a user's last label in training."""
    for reader in model.readers:
        assert reader.position is not None
        torch.nn.init.zeros_(reader.position.weight)


@torch.no_grad()
def test_nothing_at_or_after_a_label_is_read(task: SequenceTask) -> None:
    """The vector of a label is that of the history before it, read alone, as a held-out user's is."""
    model, made = network(task), Loss(Config(), task, np.random.default_rng(0))
    without_positions(model)
    numbers = torch.arange(0, len(made.labels), 3)
    windows, bags, which = made.windows(numbers)
    states = model.states(windows, [reader.item.weight for reader in model.readers])
    users = model.joined(model.read(bags, [state[which] for state in states]))
    assert len(windows[0].item) < len(users)
    for row, number in enumerate(numbers.tolist()):
        start = int(task.train.starts[made.labels.row[number]])
        before = task.train.item[start : start + int(made.labels.place[number])]
        alone = model.users(Sequences(before, torch.tensor([0, len(before)])))[0]
        torch.testing.assert_close(users[row], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_under_strict_cold_start_a_learned_vector_asks(task: SequenceTask) -> None:
    model = network(task)
    items = torch.arange(task.source[0], task.source[0] + 4)
    bag, none = (
        Bag(items[None], torch.ones(1, 4, dtype=torch.bool)),
        Bag(items[None], torch.zeros(1, 4, dtype=torch.bool)),
    )
    bags = (bag, bag, none)
    parts = model.read(bags, model.states(bags, [reader.item.weight for reader in model.readers]))
    mixed, source = (reader.encode(reader.item(items[None]), torch.tensor([4])) for reader in model.readers[:2])
    mean = mixed.mean(dim=1)
    torch.testing.assert_close(
        parts[1], model.attention(source, bag.real, model.cold[None], mean), atol=1e-5, rtol=1e-5
    )
    assert parts[2].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_the_loss_by_hand(task: SequenceTask, loss: str) -> None:
    config = Config(
        loss=loss, dropout=0.0, contrast=0.3, triplet=0.2, margin=1.0, rate_mixed_source=2.0, negatives=20_000
    )
    model, made = network(task, dropout=0.0), Loss(config, task, np.random.default_rng(4))
    model.config = config  # type: ignore[assignment]
    without_positions(model)
    numbers = next(made.batches())[:9]
    made.rng = np.random.default_rng(5)
    found = float(made(model, numbers))
    rows, items = made.labels.row[numbers], made.labels.item[numbers]
    draw = np.random.default_rng(5)
    tables, unit = [reader.item.weight for reader in model.readers], normalize(model.readers[2].item.weight, dim=1)
    mixed = tri_cdr.newest(task.train, rows, made.labels.place[numbers], 50)
    bags = (mixed, *made.halves.before(made.labels, numbers, 50))
    parts = model.read(bags, model.states(bags, tables))
    users, wanted = model.joined(parts), 0.0
    softplus = torch.nn.functional.softplus
    if loss == "bce":
        drawn = made.unseen.draw(rows, items, 1, draw)[:, 0]
        for user, item, other in zip(users, items, drawn, strict=True):
            wanted += float(softplus(-(user @ unit[item])) + softplus(user @ unit[other])) / 9
    else:
        low, high = task.target
        scores = users @ unit[low:high].T
        wanted = -float(scores.log_softmax(1)[torch.arange(9), items - low].mean())
    last = [k for k in range(9) if k == 8 or rows[k + 1] != rows[k]]
    x, s, t = (f(part[last]) for f, part in zip(model.projections, parts, strict=True))
    for one, other, rate in ((x, s, 2.0), (x, t, 1.0), (s, t, 1.0)):
        wanted += 0.3 * rate / 4 * float(contrast(normalize(one, dim=1), normalize(other, dim=1), 0.1))
    gaps = [(s[k] - x[k]).norm() - (s[k] - t[k]).norm() + 1.0 for k in range(len(last))]
    wanted += 0.2 * sum(max(0.0, float(gap)) for gap in gaps) / len(last)
    assert found == pytest.approx(wanted, rel=0.01 if loss == "softmax" else 1e-4)


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(loss="hinge", scale=0.0, margin=-1.0)
    for line in (
        "loss is 'hinge'; choose from bce, softmax",
        "scale is 0.0; give a number above 0",
        "margin is -1.0; give a number of at least 0",
    ):
        assert line in str(fault.value)
