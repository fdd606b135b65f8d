"""Parts of sequence models: known answers, and each fast form against a slow one that follows the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from trainables.sequences.blocks import AttentionBlock, Dropout, attend, causal, principal_components
from trainables.sequences.labels import Labels, training_labels
from trainables.sequences.losses import (
    Unseen,
    bce_loss,
    distinct,
    draw_shared,
    draw_weighted,
    drawn_log_sum,
    next_item_loss,
    picked,
    softmax_loss,
    step,
)
from trainables.sequences.ranking import Scorer, by_length
from trainables.sequences.views import Range, batches, padded, windows, within
from trainables.tasks.sequential import OVERLAPPING, HeldOut, Sequences, SequenceTask

from .sequence_worlds import histories, lists

# --- sequences and batches ----------------------------------------------------------------------------------------


def test_items_of_one_domain_keep_their_order() -> None:
    part = within(histories([1, 7, 2], [8], [], [9, 3]), (0, 5))
    assert part.item.tolist() == [1, 2, 3]
    assert part.starts.tolist() == [0, 2, 2, 2, 3]


def test_the_newest_items_side_by_side() -> None:
    given = histories([1, 2, 3], [], [4], [5, 6])
    first, length = windows(given.starts, 2)
    assert first.tolist() == [1, 3, 3, 4]
    assert length.tolist() == [2, 0, 1, 2]
    item, real = padded(given.item, first, length)
    assert item.tolist() == [[2, 3], [0, 0], [4, 0], [5, 6]]
    assert real.tolist() == [[True, True], [False, False], [True, False], [True, True]]


def test_batches_hold_every_sequence_once_and_pad_little() -> None:
    length = torch.from_numpy(np.random.default_rng(0).geometric(0.15, 3000))
    parts = list(batches(length, 32, np.random.default_rng(1)))
    assert sorted(torch.cat(parts).tolist()) == list(range(3000))
    assert [len(part) for part in parts].count(32) == 93
    padding = sum(int(length[part].max()) * len(part) for part in parts) / int(length.sum())
    assert padding < 1.2  # in random batches of 32 it is 3.6
    assert [part.tolist() for part in parts] != [
        part.tolist() for part in batches(length, 32, np.random.default_rng(2))
    ]


def test_histories_are_read_in_order_whatever_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainables.sequences.ranking._ROWS", 2)
    given = histories([1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11])
    read = by_length(given, 3, lambda item_BL, length_B: item_BL.gather(1, length_B[:, None] - 1).float())
    assert read.squeeze(1).tolist() == [3, 4, 6, 10, 11]
    first = by_length(given, 3, lambda item_BL, length_B: item_BL[:, :1].float())
    assert first.squeeze(1).tolist() == [1, 4, 5, 8, 11]


# --- labels -------------------------------------------------------------------------------------------------------


def labels_by_hand(task: SequenceTask, how: str, hidden: list[int]) -> list[tuple[int, ...]]:
    """Row, at, item, place, source and target items before, from the definition, item by item."""
    rows = []
    for row, items in enumerate(lists(task.train)):
        in_target = [task.target[0] <= item < task.target[1] for item in items]
        if how == "merged":
            shown, wanted = [not (row in hidden and own) for own in in_target], [True] * len(items)
        else:
            shown, wanted = [own == (how == "target") for own in in_target], in_target
        for place, item in enumerate(items):
            if wanted[place] and any(shown[:place]):
                own = sum(in_target[:place])
                rows.append((row, sum(shown[:place]) - 1, item, place, place - own, own))
    return rows


@pytest.mark.parametrize("how", ["merged", "target", "inter"])
def test_labels_are_those_of_the_definition(task: SequenceTask, how: str) -> None:
    labels = training_labels(task, how)
    columns = [labels.row, labels.at, labels.item, labels.place, labels.before_source, labels.before_target]
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == labels_by_hand(task, how, [])
    if how == "merged":
        assert labels.shown.item.equal(task.train.item)
        assert len(labels) == len(task.train.item) - len(task.train)
    else:
        assert labels.shown.item.equal(within(task.train, task.target if how == "target" else task.source).item)


def test_labels_whose_history_hides_the_target_domain(task: SequenceTask) -> None:
    hidden = (task.group == OVERLAPPING) & (torch.arange(len(task.train)) % 2 == 0)
    labels = training_labels(task, "merged", hidden)
    columns = [labels.row, labels.at, labels.item, labels.place, labels.before_source, labels.before_target]
    by_hand = labels_by_hand(task, "merged", hidden.nonzero().flatten().tolist())
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == by_hand
    for row in hidden.nonzero().flatten().tolist():
        assert all(task.source[0] <= item < task.source[1] for item in lists(labels.shown)[row])


def test_one_label_of_each_sequence(task: SequenceTask) -> None:
    labels, rng = training_labels(task, "inter"), np.random.default_rng(0)
    drawn = [labels[labels.one_each(rng)] for _ in range(200)]
    assert all(one.row.tolist() == labels.row.unique().tolist() for one in drawn)
    seen = {(row, item) for one in drawn for row, item in zip(one.row.tolist(), one.item.tolist(), strict=True)}
    assert seen == set(zip(labels.row.tolist(), labels.item.tolist(), strict=True))


@pytest.mark.parametrize("how", ["merged", "target", "inter"])
@pytest.mark.parametrize("most", [2, 4, 50])
def test_batches_show_what_stands_before_each_label(task: SequenceTask, how: str, most: int) -> None:
    labels, numbers = training_labels(task, how), []
    shown = lists(labels.shown)
    for batch in labels.batches(16, most, np.random.default_rng(0)):
        for row, column, label, number in zip(
            *(part.tolist() for part in (batch.row, batch.column, batch.label, batch.number)), strict=True
        ):
            before = shown[int(labels.row[number])][: int(labels.at[number]) + 1]
            assert label == labels.item[number]
            assert batch.item[row, : column + 1].tolist() == before[-(column + 1) :]
            numbers.append(number)
        assert int(batch.length.max()) == batch.item.shape[1] <= most
        newest = torch.full((len(batch.item),), -1).scatter_reduce_(0, batch.row, batch.column, "amax")
        assert newest.tolist() == (batch.length - 1).tolist()  # nothing is read that predicts no label
    last = labels.at[torch.tensor([int((labels.row == row).nonzero().max()) for row in labels.row.tolist()])]
    assert sorted(numbers) == (last - labels.at < most).nonzero().flatten().tolist()


# --- negatives and losses -----------------------------------------------------------------------------------------


def test_softmax_known_answer() -> None:
    """Two drawn items of score 0 stand for a domain of 10: -1 + log(e + 10)."""
    one, drawn = torch.tensor([[1.0]]), torch.tensor([[1, 2]])
    loss = softmax_loss(one, torch.tensor([0]), one, [(0, 10)], drawn, torch.zeros(1, 2, 1))
    assert float(loss) == pytest.approx(1.54304, abs=1e-5)


def test_bce_known_answer() -> None:
    assert float(bce_loss(torch.ones(1, 1), torch.ones(1, 1), -torch.ones(1, 1, 1))) == pytest.approx(
        0.626523, abs=1e-6
    )


def test_sampled_softmax_is_the_softmax_over_the_domain_on_average() -> None:
    """-log p over all 40 items of a domain, against 4,000 draws of 20 of them."""
    torch.manual_seed(0)
    low, high = 10, 50
    vectors, state, label = torch.randn(60, 4), torch.randn(3, 4), torch.tensor([10, 31, 49])
    full = functional.cross_entropy(state @ vectors[low:high].T, label - low, reduction="sum")
    rng = np.random.default_rng(0)

    def sampled(count: int) -> float:
        drawn = torch.from_numpy(rng.integers(low, high, count))
        return float(next_item_loss(state, label, vectors[label], drawn, vectors[drawn], high - low))

    # A mean of logs is below the log of the mean: with 20 draws the estimate is a little low.
    assert np.mean([sampled(20) for _ in range(4000)]) == pytest.approx(float(full), rel=0.06)
    assert sampled(20_000) == pytest.approx(float(full), rel=0.02)


def test_the_sum_over_drawn_items_and_its_gradient_are_those_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    state, drawn, shift, slope = (torch.randn(*shape, generator=rng).double() for shape in ((6, 4), (5, 4), (5,), (6,)))
    label, number = torch.tensor([0, 1, 2, 3, 3, 9]), torch.tensor([3, 1, 3, 7, 3])

    def by_torch(state: Tensor, drawn: Tensor) -> Tensor:
        return (state @ drawn.T + shift).masked_fill(number == label[:, None], -torch.inf).logsumexp(dim=1)

    found, wanted = [], []
    for log_sum, out in (
        (partial(drawn_log_sum, shift_K=shift, label_N=label, drawn_K=number), found),
        (by_torch, wanted),
    ):
        given = [part.clone().requires_grad_() for part in (state, drawn)]
        value = log_sum(*given)
        out += [value.detach(), *torch.autograd.grad((value * slope).sum(), given)]
    torch.testing.assert_close(found, wanted)


def test_where_all_drawn_items_are_the_label_there_is_no_loss() -> None:
    state = torch.ones(2, 3, requires_grad=True)
    label, drawn = torch.tensor([4, 4]), torch.tensor([4])
    loss = next_item_loss(state, label, torch.ones(2, 3), drawn, torch.ones(1, 3), 10)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert state.grad is not None
    assert state.grad.tolist() == [[0.0] * 3] * 2


def test_uneven_draws_are_weighted_by_the_inverse_of_their_chance() -> None:
    """With the weights 1 to 5 of the other domain beside them, which change nothing."""
    torch.manual_seed(0)
    vectors, state, label = torch.randn(35, 4), torch.randn(3, 4), torch.tensor([5, 12, 34])
    full = functional.cross_entropy(state @ vectors[5:].T, label - 5)
    weight = torch.cat([torch.arange(1, 6), torch.arange(1, 31)])
    domains = [(0, 5), (5, 35)]
    drawn, inverse = draw_weighted(domains, 40_000, np.random.default_rng(0), weight)
    assert float((drawn[1] == 34).float().mean()) == pytest.approx(30 / 465, abs=0.005)
    assert float(inverse[1][drawn[1] == 34][0]) == pytest.approx(465 / 30)
    loss = softmax_loss(state, label, vectors[label], domains, drawn, vectors[drawn], inverse)
    assert float(loss) == pytest.approx(float(full), rel=0.02)


def test_a_drawn_label_is_not_its_own_negative() -> None:
    state, zero = torch.tensor([[5.0, 0.0]]), torch.tensor([0])
    loss = next_item_loss(state, zero, torch.eye(2)[:1], zero.expand(8), torch.eye(2)[:1].expand(8, 2), 1)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)  # the domain holds nothing else


def test_losses_against_loops_over_labels_and_drawn_items() -> None:
    torch.manual_seed(0)
    state, vectors = torch.randn(5, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    label, domains = torch.tensor([1, 12, 7, 19, 3]), [(0, 8), (8, 20)]
    shared = draw_shared(domains, 6, np.random.default_rng(0))
    softmax = 0.0
    for row, item in enumerate(label.tolist()):
        place = 0 if item < 8 else 1
        low, high = domains[place]
        score = float(state[row] @ vectors[item])
        rest = sum(
            math.exp(float(state[row] @ vectors[other])) * (high - low) / 6
            for other in shared[place].tolist()
            if other != item
        )
        softmax += (math.log(math.exp(score) + rest) - score) / 5
    found = softmax_loss(state, label, vectors[label], domains, shared, vectors[shared])
    assert float(found) == pytest.approx(softmax, abs=1e-12)

    apart, bce = torch.tensor([[2, 3], [9, 10], [0, 0], [8, 15], [5, 6]]), 0.0
    for row, item in enumerate(label.tolist()):
        bce -= math.log(1 / (1 + math.exp(-float(state[row] @ vectors[item])))) / 5
        for other in apart[row].tolist():
            bce -= math.log(1 - 1 / (1 + math.exp(-float(state[row] @ vectors[other])))) / 10
    assert float(bce_loss(state, vectors[label], vectors[apart])) == pytest.approx(bce, abs=1e-12)


@pytest.mark.parametrize("domains", [[(0, 6), (6, 14)], [(6, 14), (0, 6)], [(6, 14)]])
def test_negatives_are_all_items_of_the_domain_but_those_of_the_sequence_and_alike_likely(domains: list[Range]) -> None:
    train = histories([0, 13, 3, 6], [], [5, 7, 8, 9, 10, 11, 12, 13], [1, 2, 6])
    row, label = torch.tensor([0, 0, 2, 3]), torch.tensor([13, 6, 7, 6])
    drawn = Unseen(train, domains).draw(row, label, 6000, np.random.default_rng(0))
    free = [[7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 11, 12], [6], [7, 8, 9, 10, 11, 12, 13]]
    for found, items in zip(drawn, free, strict=True):
        numbers, counts = found.unique(return_counts=True)
        assert numbers.tolist() == items
        assert (counts / 6000 - 1 / len(items)).abs().max() < 0.025  # 5 standard deviations
    if (0, 6) in domains:
        other = Unseen(train, domains).draw(torch.tensor([0, 3]), torch.tensor([3, 1]), 500, np.random.default_rng(0))
        assert [found.unique().tolist() for found in other] == [[1, 2, 4, 5], [0, 3, 4, 5]]


def test_no_training_label_gets_a_negative_of_its_own_sequence(task: SequenceTask) -> None:
    labels = training_labels(task, "merged")
    drawn = Unseen(task.train, [task.source, task.target]).draw(labels.row, labels.item, 20, np.random.default_rng(0))
    taken = lists(task.train)
    for row, item, negatives in zip(labels.row.tolist(), labels.item.tolist(), drawn.tolist(), strict=True):
        low, high = task.source if task.source[0] <= item < task.source[1] else task.target
        assert all(low <= negative < high for negative in negatives)
        assert not set(negatives) & set(taken[row])


def test_distinct_items_and_where_each_is_among_them() -> None:
    one, other = torch.tensor([[7, 2], [2, 5]]), torch.tensor([5, 9])
    wanted, (one_at, other_at) = distinct(12, one, other)
    assert wanted.tolist() == [2, 5, 7, 9]
    assert wanted[one_at].equal(one)
    assert wanted[other_at].equal(other)


def test_a_step_goes_down_and_refuses_a_loss_that_is_no_number() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimiser = torch.optim.SGD([weight], lr=0.5)
    assert step(optimiser, weight.square().sum()) == 9.0
    assert weight.item() == pytest.approx(0.0)
    with pytest.raises(FloatingPointError, match="the loss is nan; lower lr"):
        step(optimiser, weight.sum() * torch.nan)


# --- attention ----------------------------------------------------------------------------------------------------


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One query after the other, one key after the other; [L, K], [M, K], [M, K], [L, M]."""
    out = torch.zeros_like(query)
    for i in range(len(query)):
        weights = [
            math.exp(float(query[i] @ key[j]) / math.sqrt(query.shape[1])) for j in range(len(key)) if mask[i, j]
        ]
        values = [value[j] for j in range(len(key)) if mask[i, j]]
        for weight, vector in zip(weights, values, strict=True):
            out[i] += weight / sum(weights) * vector
    return out


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_leaves_out_a_share_and_scales_the_rest(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made, x = Dropout(share), torch.full((3, 7, 20_001), 2.0, dtype=dtype, requires_grad=True)
    found = made(x)
    left_out = found == 0
    assert float(left_out.double().mean()) == pytest.approx(share, abs=0.003)
    assert found[~left_out].unique().tolist() == pytest.approx([2 / (1 - share)], rel=2e-4)
    one, other = (part.double() - share for part in (left_out[..., :-1], left_out[..., 1:]))  # of the same 64 bits
    assert float((one * other).mean()) == pytest.approx(0, abs=0.003)
    found.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, (found / 2).detach(), rtol=1e-6, atol=0)
    assert not made(x).equal(found)
    torch.manual_seed(0)
    assert made(x).equal(found)
    assert made.eval()(x).equal(x)


def test_attention_against_loops_and_nothing_read_where_nothing_is_allowed() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 4, 4) < 0.5
    mask[0, 0, 1] = False
    read = attend(query, key, value, mask)
    for b in range(2):
        for h in range(3):
            expected = attention_by_hand(query[b, h], key[b, h], value[b, h], mask[b, 0])
            torch.testing.assert_close(read[b, h], expected, atol=1e-12, rtol=0)
    assert (read[0, :, 1] == 0).all()


def test_a_query_that_may_read_nothing_has_a_gradient_that_is_a_number() -> None:
    query, key, value = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    attend(query, key, value, torch.tensor([[[[True, True], [False, False]]]])).sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in (query, key, value))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("activation", "joined"), [("relu", False), ("gelu", True)])
@pytest.mark.parametrize("crossed", [False, True])
def test_a_block_against_loops(norm: str, activation: str, joined: bool, crossed: bool) -> None:
    torch.manual_seed(0)
    block = AttentionBlock(6, 2, 10, 0.0, norm=norm, activation=activation, joined=joined).double()
    x, memory = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    mask = causal(4, x.device)
    found = block(x, mask, memory if crossed else None)[0]

    def read(given: Tensor) -> Tensor:
        query, (key, value) = block.query(given), block.key_value(memory[0] if crossed else given).chunk(2, dim=1)
        heads = [
            attention_by_hand(query[:, part], key[:, part], value[:, part], mask[0, 0])
            for part in (slice(0, 3), slice(3, 6))
        ]
        return block.out(torch.cat(heads, dim=1))

    if norm == "pre":
        y = x[0] + read(block.attention_norm(x[0]))
        expected = y + block.map(block.map_norm(y))
    else:
        y = block.attention_norm(x[0] + read(x[0]))
        expected = block.map_norm(y + block.map(y))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_block_at_the_newest_places_alone(norm: str, joined: bool) -> None:
    torch.manual_seed(0)
    block = AttentionBlock(6, 2, 10, 0.0, norm=norm, joined=joined).double()
    x, length = torch.randn(4, 5, 6, dtype=torch.float64), torch.tensor([5, 1, 3, 0])
    found, whole = block.newest(x, length), block(x, causal(5, x.device))
    torch.testing.assert_close(found[:3], whole[torch.arange(3), length[:3] - 1], atol=1e-12, rtol=0)
    assert found[3].isfinite().all()


def test_picked_rows_are_those_of_indexing() -> None:
    vectors, place = torch.randn(7, 3), torch.tensor([[0, 6, 2, 2], [5, 0, 1, 6]])
    assert picked(vectors, place).equal(vectors[place])
    assert picked(vectors, place[:, :0]).shape == (2, 0, 3)


def test_components_start_items_beside_those_that_read_alike() -> None:
    text = torch.randn(40, 5)
    text[7] = text[3]
    start = principal_components(text, 8, 0.02)
    assert start.shape == (40, 8)
    assert start[7].equal(start[3])
    assert float(start[:, :5].std()) == pytest.approx(0.02)
    assert (start[:, 5:] == 0).all()  # titles have fewer directions than the table
    distance = torch.cdist(start, start) / torch.cdist(text - text.mean(0), text - text.mean(0)).clamp(min=1e-9)
    off = ~torch.eye(40, dtype=torch.bool)
    off[3, 7] = off[7, 3] = False
    assert float(distance[off].std() / distance[off].mean()) < 1e-3  # all five directions are kept


# --- scores -------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """A user is the mean of the items."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.item = nn.Embedding(items, 4)

    def users(self, history: Sequences, domain: Range) -> Tensor:
        return torch.stack([self.item.weight[items].mean(dim=0) for items in lists(history)])

    def items(self, domain: Range) -> Tensor:
        return self.item.weight[slice(*domain)]


def test_scores_are_inner_products_and_popularity_ranks_what_shows_nothing(task: SequenceTask, scored: HeldOut) -> None:
    torch.manual_seed(0)
    network = Mean(task.items)
    low, high = task.target
    shown = lists(scored.history)
    shown[0] = []
    emptied = replace(scored, history=histories(*shown))
    popular = [int((task.train.item == item).sum()) for item in range(low, high)]
    for reads in ("merged", "target"):
        scores = Scorer.of_task(network, task, reads)(emptied, task, 0)
        assert scores.shape == (len(scored), high - low)
        assert not scores.requires_grad
        for row, history in enumerate(shown):
            visible = history if reads == "merged" else [item for item in history if low <= item < high]
            if visible:
                user = network.item.weight[visible].mean(dim=0)
                torch.testing.assert_close(scores[row], network.item.weight[low:high] @ user)
            else:
                assert scores[row].tolist() == popular
    inter = scored.protocol == task.protocols.index("inter")
    only_target = Scorer.of_task(network, task, "target")(scored, task, 0)
    assert (only_target[inter] == torch.tensor(popular)).all()


def test_labels_can_be_chosen(task: SequenceTask) -> None:
    labels = training_labels(task, "merged")
    chosen = labels[task.group[labels.row] == OVERLAPPING]
    assert isinstance(chosen, Labels)
    assert 0 < len(chosen) < len(labels)
    assert (task.group[chosen.row] == OVERLAPPING).all()
    rows = [batch.number for batch in chosen.batches(8, 50, np.random.default_rng(0))]
    assert sorted(torch.cat(rows).tolist()) == list(range(len(chosen)))
