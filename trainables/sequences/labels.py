"""Which training items are labels, and what is shown before them.

Draws come from the NumPy generator that is passed in. Shapes: S sequences, N labels, B sequences of a batch, L positions
of target items, M of source items, I items of both domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from trainables.sequences.views import Bag, Range, batches, filtered, inside, newest, padded, within
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask

SEQUENCES_READ = ("merged", "target")  # what a model that knows one catalogue reads: both domains' items | the target's


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some sequences, and the labels that their states predict."""

    item: Tensor  # int64 [B, L] the newest shown items before the last label, padded at the end with item 0
    length: Tensor  # int64 [B] real items of each row
    row: Tensor  # int64 [N] row of each label in the batch
    column: Tensor  # int64 [N] position whose state predicts the label
    label: Tensor  # int64 [N] item number
    number: Tensor  # int64 [N] which of the `Labels` it is


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Items to be predicted in training, sorted by sequence, then by time, and what is shown before them."""

    shown: Sequences  # S sequences, what the model reads of them
    row: Tensor  # int64 [N] sequence
    at: Tensor  # int64 [N] place among the shown items of the sequence, from 0, of the last one before the label
    item: Tensor  # int64 [N] item number
    place: Tensor  # int64 [N] place of the label in the merged sequence, from 0
    before_source: Tensor  # int64 [N] source-domain items before the label in the merged sequence, shown or not
    before_target: Tensor  # int64 [N] target-domain items before it

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, index: Tensor) -> Labels:
        """Return these labels, by ascending index or mask."""
        flat = {field.name: getattr(self, field.name)[index] for field in fields(self)[1:]}
        return Labels(shown=self.shown, **flat)

    def one_each(self, rng: np.random.Generator) -> Tensor:
        """Return which labels: a random one of each sequence, for models that may not train at all positions."""
        count = torch.bincount(self.row)
        first, count = (count.cumsum(0) - count)[count > 0], count[count > 0]
        return first + torch.from_numpy(rng.integers(count.cpu().numpy())).to(first.device)

    def histories(self, number_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return the newest `most` items before each of these labels, padded at the end, [B, L], and their number [B]."""
        before_B = self.at[number_B] + 1
        length_B = before_B.clamp(max=most)
        item_BL, _ = padded(self.shown.item, self.shown.starts[self.row[number_B]] + before_B - length_B, length_B)
        return item_BL, length_B

    def batches(self, size: int, most: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield every sequence with labels once, `size` at a time, each read over its newest `most` shown items.

        No item after the last label's state is read; a label whose state is older than the window is left out.
        """
        starts = torch.cat([self.row.new_zeros(1), torch.bincount(self.row, minlength=len(self.shown)).cumsum(0)])
        chosen = starts.diff().nonzero().squeeze(1)
        numbers = Sequences(torch.arange(len(self), device=self.row.device), starts).rows(chosen)
        visible = self.at[numbers.item[numbers.starts[1:] - 1]] + 1  # shown items up to the last label's state
        length = visible.clamp(max=most)
        older = visible - length
        for batch in batches(length, size, rng):
            part = numbers.rows(batch)
            row, number = part.row, part.item
            column = self.at[number] - older[batch][row]
            read = column >= 0
            row, number, column = row[read], number[read], column[read]
            first = self.shown.starts[chosen[batch]] + older[batch]
            item, _ = padded(self.shown.item, first, length[batch])
            yield Batch(
                item=item, length=length[batch], row=row, column=column, label=self.item[number], number=number
            )  # fmt: skip


def domains_read(task: SequenceTask, sequences: str) -> list[Range]:
    """Return the domains whose items are read and drawn: `target` alone, or both, in the order of their item numbers.

    By that order, both directions of a pair of domains draw, and so train, alike.
    """
    return [task.target] if sequences == "target" else sorted([task.source, task.target])


def training_labels(task: SequenceTask, sequences: str, hidden: Tensor | None = None) -> Labels:
    """Return the labels of the training users.

    `sequences`: `merged` shows all items, and all of them but each first one are labels; `source` and `target` show one
    domain's items, which are the labels; `inter` shows the source domain's and asks for the target's, as the protocol of
    that name does. `hidden`, bool [S]: sequences of which target-domain items are labels of `merged`, but not shown.
    """
    in_target = inside(task.train.item, task.target)
    if sequences == "merged":
        shown = torch.ones_like(in_target) if hidden is None else ~(in_target & hidden[task.train.row])
        return make_labels(task, shown, torch.ones_like(in_target))
    if sequences == "source":
        return make_labels(task, ~in_target, ~in_target)
    return make_labels(task, in_target if sequences == "target" else ~in_target, in_target)


def halved_labels(task: SequenceTask) -> Labels:
    """Return the labels of each domain's part of each sequence, as though it were a user of its own.

    Sequence s is the source part of user s, sequence S + s the target part; for systems that know no link between them.
    """
    source, target = (training_labels(task, which) for which in ("source", "target"))
    after = len(source.shown.item)
    shown = Sequences(
        torch.cat([source.shown.item, target.shown.item]),
        torch.cat([source.shown.starts[:-1], target.shown.starts + after]),
    )
    flat = {
        field.name: torch.cat([getattr(source, field.name), getattr(target, field.name)])
        for field in fields(Labels)[2:]
    }
    return Labels(shown=shown, row=torch.cat([source.row, target.row + len(task.train)]), **flat)


def make_labels(task: SequenceTask, shown_N: Tensor, wanted_N: Tensor) -> Labels:
    """Return as labels the wanted training items before which the same sequence has a shown one."""
    train = task.train
    row, first = train.row, train.starts[:-1]

    def before(chosen_N: Tensor) -> Tensor:
        count = torch.cat([chosen_N.new_zeros(1, dtype=torch.int64), chosen_N.long().cumsum(0)])
        return count[:-1] - count[first][row]

    shown_before = before(shown_N)
    chosen = wanted_N & (shown_before > 0)
    in_target = inside(train.item, task.target)
    return Labels(
        shown=filtered(train, shown_N),
        row=row[chosen],
        at=shown_before[chosen] - 1,
        item=train.item[chosen],
        place=before(torch.ones_like(chosen))[chosen],
        before_source=before(~in_target)[chosen],
        before_target=before(in_target)[chosen],
    )


@dataclass(frozen=True, kw_only=True)
class Halves:
    """The source and the target part of each training sequence, in order; some are empty. Row s of both is sequence s."""

    source: Sequences
    target: Sequences

    @staticmethod
    def of_task(task: SequenceTask) -> Halves:
        """Return those of a task's training sequences."""
        return Halves(source=within(task.train, task.source), target=within(task.train, task.target))

    def before(self, labels: Labels, number_B: Tensor, most: int) -> tuple[Bag, Bag]:
        """Return the newest `most` source items before each of these labels, and as many target items."""
        row_B = labels.row[number_B]
        return (
            newest(self.source, row_B, labels.before_source[number_B], most),
            newest(self.target, row_B, labels.before_target[number_B], most),
        )


@dataclass(frozen=True, kw_only=True)
class Read:
    """What training reads of some users: their target items but the last, their source items, and their labels.

    The state at column c of a row is that before its target item c; at c = 0 no target item has been shown.
    """

    shown: Bag  # [B, L] target items that something follows
    source: Bag  # [B, M]
    reads: Tensor  # bool [B, L + 1, M] source items before each target item
    row: Tensor  # int64 [N] row of each label
    column: Tensor  # int64 [N] column of the state that predicts it
    label: Tensor  # int64 [N] item number


class TargetLabels:
    """Training users' target items as labels, each predicted from the target and source items before it.

    `overlapping`: of users of both domains alone, else of target-only users too. A label before which nothing stands is
    left out.
    """

    def __init__(self, task: SequenceTask, most: int, *, overlapping: bool = True) -> None:
        self.halves, self.most = Halves.of_task(task), most
        in_target = inside(task.train.item, task.target)
        before = torch.cat([in_target.new_zeros(1, dtype=torch.int64), (~in_target).long().cumsum(0)])
        first = before[task.train.starts[:-1]]
        self.before_source = (before[:-1] - first[task.train.row])[in_target]  # of each target item
        target, source = self.halves.target.lengths, self.halves.source.lengths
        wanted = (target > 0) & (task.group == OVERLAPPING) if overlapping else target > 0
        before_first = torch.zeros_like(target)  # source items that are read before the first target item
        before_first[target > 0] = self.before_source[self.halves.target.starts[:-1][target > 0]]
        begins = before_first > (source - most).clamp(min=0)
        self.rows = (wanted & ((target > 1) | begins)).nonzero().squeeze(1)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
        """Yield the users, those of about the same number of target items together."""
        for part in batches(self.halves.target.lengths[self.rows], size, rng):
            yield self.rows[part]

    def read(self, row_B: Tensor) -> Read:
        """Return what is read of these users."""
        halves, device = self.halves, row_B.device
        target = newest(halves.target, row_B, halves.target.lengths[row_B], self.most)
        if target.item.shape[1] == 1:  # a label each and nothing before it: a column of padding is shown
            target = Bag(*(functional.pad(part, (0, 1)) for part in (target.item, target.real)))
        source = newest(halves.source, row_B, halves.source.lengths[row_B], self.most)
        place_L = torch.arange(target.item.shape[1], device=device)
        first_B = halves.target.starts[row_B] + halves.target.lengths[row_B] - target.length
        before_BL = self.before_source[(first_B[:, None] + place_L).clamp(max=len(self.before_source) - 1)]
        older_B = halves.source.lengths[row_B] - source.length  # source items that the window leaves out
        place_M = torch.arange(source.item.shape[1], device=device)
        reads = (place_M < (before_BL - older_B[:, None])[..., None]) & source.real[:, None]
        row, column = (target.real & ((place_L > 0) | reads.any(dim=2))).nonzero(as_tuple=True)
        return Read(
            shown=Bag(target.item[:, :-1], target.real[:, 1:]), source=source, reads=reads, row=row, column=column,
            label=target.item[row, column],
        )  # fmt: skip


def paired(first_N: Tensor, second_M: Tensor, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield half a batch of each in random order until the longer one is done; the shorter one starts again."""
    half = max(1, size // 2)
    orders = [part[torch.from_numpy(rng.permutation(len(part))).to(part.device)] for part in (first_N, second_M)]
    one, other = (torch.split(order, half) for order in orders)
    for at in range(max(len(one), len(other))):
        yield one[at % len(one)], other[at % len(other)]


class SameLabel:
    """Random draws, for a label, of another label that is the same item."""

    def __init__(self, labels: Labels) -> None:
        self.item = labels.item
        self.number = labels.item.argsort(stable=True)  # labels by item
        self.count_I = torch.bincount(labels.item)
        self.first_I = self.count_I.cumsum(0) - self.count_I
        self.rank = torch.empty_like(self.number)  # place of each label among those of its item
        self.rank[self.number] = (
            torch.arange(len(labels), device=self.item.device) - self.first_I[labels.item[self.number]]
        )

    def draw(self, number_B: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a label of the same item for each label, int64 [B]: itself where there is no other."""
        item_B, rank_B = self.item[number_B], self.rank[number_B]
        others_B = self.count_I[item_B] - 1
        drawn_B = torch.from_numpy(rng.integers(others_B.clamp(min=1).cpu().numpy())).to(item_B.device)
        place_B = torch.where(others_B > 0, drawn_B + (drawn_B >= rank_B), rank_B)
        return self.number[self.first_I[item_B] + place_B]
