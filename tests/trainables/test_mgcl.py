"""MGCL's graphs and preferences against loops, and what its sequence graph would leak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from features.errors import InputError
from trainables.models.mgcl import MGCL, WIDTH, Config, Loss, SequenceGraph, normalised_graph, tied
from trainables.sequences.views import Bag
from trainables.tasks.sequential import Sequences, SequenceTask

from .sequence_worlds import check_users_of_one_target_item


def network(task: SequenceTask, **changes: Any) -> MGCL:
    torch.manual_seed(0)
    graph = normalised_graph(task)
    made = MGCL(Config(**changes), task.items, len(task.train), task.source, task.target, graph).eval()
    torch.nn.init.normal_(made.item.weight, std=0.3)
    made.refresh()
    return made


@torch.no_grad()
def test_the_global_graph_against_dense_powers(task: SequenceTask) -> None:
    model, users = network(task), len(task.train)
    size = users + task.items
    adjacency = torch.zeros(size, size, dtype=torch.float64)
    for row, item in zip(task.train.row.tolist(), task.train.item.tolist(), strict=True):
        adjacency[row, users + item] = adjacency[users + item, row] = 1
    root = adjacency.sum(1).clamp(min=1).rsqrt()
    step = root[:, None] * adjacency * root
    start = torch.cat([model.user.weight, model.item.weight]).double()
    wanted = sum(torch.linalg.matrix_power(step, power) @ start for power in range(4)) / 4
    torch.testing.assert_close(model.walked().double(), wanted[users:], atol=1e-5, rtol=1e-4)  # type: ignore[index]


@torch.no_grad()
@pytest.mark.parametrize("both", [False, True])
def test_the_sequence_graph_against_a_loop_over_edges(both: bool) -> None:
    torch.manual_seed(0)
    made = SequenceGraph().double()
    e, real = torch.randn(1, 5, WIDTH, dtype=torch.float64), torch.arange(5)[None] < 4
    out = made(e, real, both)
    for i in range(4):
        before = made.before(e[0, i - 1] if i else torch.zeros(WIDTH, dtype=torch.float64))
        after = made.after(e[0, i + 1] if both and i < 3 else torch.zeros(WIDTH, dtype=torch.float64))
        w_r, w_z, w_n = made.from_neighbours(torch.cat([before, after])).chunk(3)
        u_r, u_z, u_n = made.from_item(e[0, i]).chunk(3)
        r, z = torch.sigmoid(w_r + u_r), torch.sigmoid(w_z + u_z)
        n = torch.tanh(w_n + r * u_n)
        torch.testing.assert_close(out[0, i], (1 - z) * e[0, i] + z * n, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("graph", "leaks"), [("past", False), ("both", True)])
def test_t1_a_label_is_read_before_it_by_the_graph_of_both_directions_alone(
    task: SequenceTask, graph: str, leaks: bool
) -> None:
    model = network(task, graph=graph)
    items = torch.arange(task.target[0], task.target[0] + 6)[None]
    other = items.clone()
    other[0, 4:] += 6
    states = []
    for given in (items, other):
        bag = Bag(given, torch.ones(1, 6, dtype=torch.bool))
        states.append(model.preference(model.views(bag, 1, model.static_item, graph == "both")[2]))
    changed = float((states[0][0, :5] - states[1][0, :5]).abs().max())  # what predicts items 0 to 4
    assert (changed > 1e-4) is leaks


@torch.no_grad()
def test_a_label_is_predicted_from_all_source_items_before_it(task: SequenceTask) -> None:
    """A user's vector at a label, among all their labels, is that of the history before it, read alone."""
    model, made = network(task), Loss(Config(), task, np.random.default_rng(0))
    captured: list[Any] = []
    made.rated = lambda user, row, label, vectors: captured.append((user, row, label)) or user.sum()  # type: ignore[assignment, func-returns-value]
    model.position.weight.zero_()  # positions are counted from the end of what is read
    made(model, made.labels.rows[:12])
    users, rows, labels = captured[0]
    assert len(users) > 12
    for user, row, label in zip(users, rows.tolist(), labels.tolist(), strict=True):
        start, end = int(task.train.starts[row]), int(task.train.starts[row + 1])
        items = task.train.item[start:end].tolist()
        before = torch.tensor(items[: items.index(label)])
        alone = model.users(Sequences(before, torch.tensor([0, len(before)])), task.target)[0]
        torch.testing.assert_close(user, alone, atol=1e-5, rtol=1e-5)


def test_users_of_one_target_item_may_fill_a_batch(task: SequenceTask) -> None:
    model, made = network(task, dropout=0.0), Loss(Config(dropout=0.0), task, np.random.default_rng(0))
    check_users_of_one_target_item(model, made)


def test_the_contrast_by_a_loop() -> None:
    a, b, c = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)
    )
    wanted = sum(float(softplus(-(a[k] @ b[k])) + softplus(a[k] @ c[k])) for k in range(4)) / 4
    assert float(tied(a, b, c)) == pytest.approx(wanted, rel=1e-12)


def test_the_graph_learns_by_step_and_rests_by_epoch(task: SequenceTask) -> None:
    for refresh, learns in (("step", True), ("epoch", False)):
        model = network(task, refresh=refresh, sequence_view=False, dropout=0.0).train()
        made = Loss(Config(refresh=refresh, sequence_view=False), task, np.random.default_rng(0))
        made(model, made.labels.rows[:8]).backward()  # type: ignore[no-untyped-call]
        gradient = model.user.weight.grad
        assert (gradient is not None and float(gradient.abs().max()) > 0) is learns


def test_faults_of_a_config_are_told_together() -> None:
    with pytest.raises(InputError) as fault:
        Config(users="some", graph="none", global_view=False, sequence_view=False)
    for line in (
        "users is 'some'; choose from overlapping, all",
        "graph is 'none'; choose from past, both",
        "global_view and sequence_view are both false; keep one",
    ):
        assert line in str(fault.value)
