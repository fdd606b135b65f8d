"""Training rows of LGCD against rows made one by one from the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainables.sequence_worlds import make_sequence_task
from trainables.models.lgcd.conditions import RowRules, Rows, insert, newest, pseudo_rows, real_rows
from trainables.models.lgcd.encoders import DomainEncoders, Encoders, PretrainSpec, represent
from trainables.models.lgcd.retrieval import by_text
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask, load_task

RULES = RowRules()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> SequenceTask:
    return load_task(make_sequence_task(tmp_path_factory.mktemp("world"))[0])


@pytest.fixture(scope="module")
def encoders(task: SequenceTask) -> DomainEncoders:
    torch.manual_seed(0)
    pair = Encoders(PretrainSpec(width=8, max_length=12), task.titles()).eval()
    return DomainEncoders({task.source: pair, task.target: pair})


def generated(
    task: SequenceTask, encoders: DomainEncoders, least: float, rules: RowRules = RULES, *, told: bool = False
) -> Rows:
    rng = np.random.default_rng(0)
    return pseudo_rows(task, encoders, by_text(task, 3), rules, least, rng, by_text=told)


def state(encoders: Encoders, items: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    one = Sequences(torch.tensor(items, dtype=torch.int64), torch.tensor([0, len(items)]))
    by_id, by_text = represent(encoders, one, last=True)
    return by_id[0], by_text[0]


def test_real_rows_are_those_of_the_definition(task: SequenceTask, encoders: DomainEncoders) -> None:
    low, high = task.target
    rows, pair, place = real_rows(task, encoders, RULES), encoders.of_domain(task.source), 0
    for protocol in task.protocols:
        for user in (task.group == OVERLAPPING).nonzero().flatten().tolist():
            items = task.train.item[task.train.starts[user] : task.train.starts[user + 1]].tolist()
            for k, item in enumerate(items):
                before = items[:k]
                seen = before if protocol == "as-given" else [i for i in before if not low <= i < high]
                if not low <= item < high or not seen:
                    continue
                earlier = [i for i in before if low <= i < high]
                id_state, text_state = state(pair, seen)
                assert rows.item[place] == item
                assert bool(rows.real[place])
                assert bool(rows.has_feature[place]) == bool(earlier)
                torch.testing.assert_close(rows.id[place], id_state)
                torch.testing.assert_close(rows.text[place], text_state)
                if earlier:
                    torch.testing.assert_close(rows.feature[place], state(pair, earlier)[1])
                place += 1
    assert place == len(rows)


def test_pseudo_rows_hold_no_text_and_end_in_a_target_item(task: SequenceTask, encoders: DomainEncoders) -> None:
    rows = generated(task, encoders, -1.0)
    assert len(rows) > 0
    assert not rows.real.any()
    assert not rows.text.any()
    told = generated(task, encoders, -1.0, told=True)
    assert not told.id.any()
    assert told.text.any(dim=1).all()
    assert told.item.equal(rows.item)
    assert ((rows.item >= task.target[0]) & (rows.item < task.target[1])).all()


def test_a_higher_threshold_leaves_fewer_pseudo_rows(task: SequenceTask, encoders: DomainEncoders) -> None:
    counts = [len(generated(task, encoders, least)) for least in (-1.0, 0.6, 0.95)]
    assert counts[0] > counts[1] > counts[2] == 0


def test_newest_items_of_chosen_sequences() -> None:
    sequences = Sequences(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 3, 3, 6]))
    cut = newest(sequences, torch.tensor([2, 1, 0]), 2)
    assert cut.item.tolist() == [5, 6, 2, 3]
    assert cut.starts.tolist() == [0, 2, 2, 4]


@given(
    own=st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5),
    count=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_insertion_keeps_every_item_and_the_order_of_a_users_own(own: list[list[int]], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    starts = torch.tensor([0, *np.cumsum([len(row) for row in own])])
    sequences = Sequences(torch.tensor([item for row in own for item in row], dtype=torch.int64), starts)
    pseudo = torch.arange(100, 100 + len(own) * count).view(len(own), count)
    taken = torch.from_numpy(rng.random((len(own), count)) < 0.7)
    made = insert(sequences, pseudo, taken, rng)
    assert len(made) == len(own)
    for user, row in enumerate(own):
        items = made.item[made.starts[user] : made.starts[user + 1]].tolist()
        assert [item for item in items if item < 100] == row
        assert sorted(item for item in items if item >= 100) == pseudo[user][taken[user]].tolist()


def test_insertion_reaches_every_place() -> None:
    sequences = Sequences(torch.tensor([1, 2]), torch.tensor([0, 2]))
    rng = np.random.default_rng(0)
    taken, pseudo = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[9]])
    places = [insert(sequences, pseudo, taken, rng).item.tolist().index(9) for _ in range(600)]
    assert np.bincount(places, minlength=3).min() > 150  # 200 each, within 4 standard deviations
