"""The reconstruction of CTT: its maps, what a label may read, and its contrast."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.models.ctt import CTT, WIDTH, Config, Loss, contrast_of_users
from trainables.sequences.labels import TargetLabels
from trainables.sequences.views import Bag
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

from .sequence_worlds import check_users_of_one_target_item


def network(task: SequenceTask, **changes: Any) -> CTT:
    torch.manual_seed(0)
    made = CTT(Config(**changes), task.titles(), task.source, task.target).eval()
    torch.nn.init.normal_(made.item.weight, std=0.3)
    return made


def test_what_is_read_before_each_label(task: SequenceTask) -> None:
    labels = TargetLabels(task, 50)
    assert (task.group[labels.rows] == OVERLAPPING).all()
    read = labels.read(labels.rows)
    seen = set()
    for row, column, label in zip(read.row.tolist(), read.column.tolist(), read.label.tolist(), strict=True):
        user = int(labels.rows[row])
        items = task.train.item[int(task.train.starts[user]) : int(task.train.starts[user + 1])].tolist()
        before = items[: items.index(label)]
        own = [item for item in before if task.target[0] <= item < task.target[1]]
        assert read.shown.item[row, :column].tolist() == own
        assert read.source.item[row][read.reads[row, column]].tolist() == [item for item in before if item not in own]
        assert before
        seen.add((user, label))
    wanted = {
        (user, int(item))
        for user in labels.rows.tolist()
        for place, item in enumerate(task.train.item[int(task.train.starts[user]) : int(task.train.starts[user + 1])])
        if place and task.target[0] <= item < task.target[1]
    }
    assert seen == wanted


@pytest.mark.parametrize("overlapping", [True, False])
@pytest.mark.parametrize("most", [50, 2])
def test_every_user_that_is_read_has_a_label(task: SequenceTask, most: int, overlapping: bool) -> None:
    """A user whose only target item comes first has none, nor one whose source items before it are no longer read."""
    target = task.target[0]
    item = torch.cat([task.train.item, torch.tensor([target, 0, target, 0, 1, 0, target, 1, 2])])
    starts = torch.cat([task.train.starts, len(task.train.item) + torch.tensor([2, 5, 9])])
    added = replace(task, train=Sequences(item, starts), group=torch.cat([task.group, torch.full((3,), OVERLAPPING)]))
    labels = TargetLabels(added, most, overlapping=overlapping)
    read = labels.read(labels.rows)
    assert set(read.row.tolist()) == set(range(len(labels.rows)))
    new = [number - len(task.train) for number in labels.rows.tolist() if number >= len(task.train)]
    assert new == ([2] if most == 50 else [])


@torch.no_grad()
def test_rows_of_a_map_sum_to_one_and_are_nothing_without_source_items(task: SequenceTask) -> None:
    torch.manual_seed(0)
    allowed = torch.tensor([[[True, True, False], [False, False, False]]])
    maps = CTT.attention(torch.randn(1, 2, WIDTH), torch.randn(1, 3, WIDTH), allowed)
    assert maps.sum(dim=2)[0].tolist() == pytest.approx([1.0, 0.0])
    assert float(maps[0, 0, 2]) == 0


@torch.no_grad()
def test_the_aligned_view_by_a_loop(task: SequenceTask) -> None:
    """A target text reads source items through itself and through the target texts like it."""
    model = network(task)
    own = torch.arange(task.target[0], task.target[0] + 4)[None]
    other = torch.arange(task.source[0], task.source[0] + 5)[None]
    target, source = (Bag(item, torch.ones_like(item, dtype=torch.bool)) for item in (own, other))
    reads = torch.tensor([[[True] * k + [False] * (5 - k) for k in (0, 1, 3, 3, 5)]])
    _, _, weights = model.intents(target)
    found = model.crossed(target, weights, source, reads)
    text, source_text = (model.text_map(model.texts[item[0]]) for item in (own, other))
    values = model.id_value(model.item(other[0]))
    for label in range(1, 5):
        allowed = reads[0, label]
        rows = []
        for i in range(4):
            logits = model.key(source_text) @ model.query(text[i]) / math.sqrt(WIDTH)
            rows.append(logits.masked_fill(~allowed, -torch.inf).softmax(0))
        mapped = sum(weights[0, label - 1, i] * rows[i] for i in range(label))
        assert float(mapped.sum()) == pytest.approx(1.0, abs=1e-5)  # type: ignore[union-attr]
        torch.testing.assert_close(found[0, label], model.between(mapped @ values), atol=1e-5, rtol=1e-4)
    assert found[0, 0].abs().max() == 0  # nothing before the first


@torch.no_grad()
@pytest.mark.parametrize("align", ["product", "none"])
def test_a_label_is_predicted_from_what_stands_before_it(task: SequenceTask, align: str) -> None:
    """A user's vectors at all labels are those of the histories before them, read alone (without positions)."""
    model = network(task, align=align)
    model.position.weight.zero_()  # positions are counted from the end of what is read
    made = Loss(Config(align=align), task, np.random.default_rng(0))
    read = made.labels.read(made.labels.rows[:8])
    states, _, _ = model.states(read.shown, read.source, read.reads)
    for row, column, label in zip(read.row.tolist(), read.column.tolist(), read.label.tolist(), strict=True):
        user = int(made.labels.rows[row])
        items = task.train.item[int(task.train.starts[user]) : int(task.train.starts[user + 1])].tolist()
        before = torch.tensor(items[: items.index(label)])
        alone = model.users(Sequences(before, torch.tensor([0, len(before)])), task.target)[0]
        torch.testing.assert_close(states[row, column], alone, atol=1e-4, rtol=1e-4)


def test_users_of_one_target_item_may_fill_a_batch(task: SequenceTask) -> None:
    model, made = network(task, dropout=0.0), Loss(Config(dropout=0.0), task, np.random.default_rng(0))
    check_users_of_one_target_item(model, made)


@torch.no_grad()
@pytest.mark.parametrize("align", ["product", "none"])
@pytest.mark.parametrize("text", [True, False])
def test_without_texts_none_is_read(task: SequenceTask, align: str, text: bool) -> None:
    model, history = network(task, text=text, align=align), task.validation.history
    found = []
    for _ in range(2):
        made = Loss(Config(text=text, align=align), task, np.random.default_rng(0))
        value = made(model, made.labels.rows[:8])
        found.append((model.users(history, task.target), model.items(task.target), value))
        model.texts = model.texts[torch.randperm(len(model.texts), generator=torch.Generator().manual_seed(0))]
    for before, after in zip(*found, strict=True):
        assert before.equal(after) is not text


def test_the_contrast_of_two_users() -> None:
    two = torch.eye(2, WIDTH)
    assert float(contrast_of_users(two, two, 0.1)) == pytest.approx(4.5399e-5, rel=2e-3)  # log(1 + e^-10)
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    wanted = [
        torch.stack([a[k] @ b[j] / 0.5 for j in range(3)]).log_softmax(0)[k]
        for a, b in ((one, other), (other, one))
        for k in range(3)
    ]
    torch.testing.assert_close(contrast_of_users(one, other, 0.5), -torch.stack(wanted).mean())


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(loss="hinge", align="sum", tau=0.0)
    for line in (
        "loss is 'hinge'; choose from softmax, bce",
        "align is 'sum'; choose from product, none",
        "tau is 0.0; give a number above 0",
    ):
        assert line in str(fault.value)
