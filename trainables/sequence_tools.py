"""Parts that sequence models share: training labels, batches that pad little, losses, attention, scores of all items.

A model of this family ranks by the inner product of a user's vector and an item's. In its file it has a network and a
loss; the rest is here, in the order of a training step: which items are labels and what is shown before them (`Labels`),
batches of them (`Labels.batches`), drawn negatives, losses, an attention block, and scores for the task (`Scorer`).
All of it runs on the device of the task's tensors, and draws come from the NumPy generator that is passed in, on the
CPU, so that they do not depend on the device.
Shapes: S sequences, N interactions or labels, B sequences of a batch, L positions, P domains, K drawn items, U distinct
items of a batch, I items of both domains, J those of the target domain, R rows, H heads, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from trainables.tasks.sequential import OVERLAPPING, HeldOut, Sequences, SequenceTask

SEQUENCES_READ = ("merged", "target")  # what a model that knows one catalogue reads: both domains' items | the target's
_CHUNK = 64  # batches that are sorted by length together, so that a batch pads little
_ROWS = 512  # sequences encoded at once without gradients

Range = tuple[int, int]
"""First item number of a domain, and the number after its last."""


# --- sequences ----------------------------------------------------------------------------------------------------


def inside(item: Tensor, domain: Range) -> Tensor:
    """Return which items are of the domain, bool of the same shape."""
    return (item >= domain[0]) & (item < domain[1])


def filtered(sequences: Sequences, chosen_N: Tensor) -> Sequences:
    """Return the chosen items of each sequence, in their order; some sequences are left empty."""
    before = torch.cat([chosen_N.new_zeros(1, dtype=torch.int64), chosen_N.long().cumsum(0)])
    return Sequences(item=sequences.item[chosen_N], starts=before[sequences.starts])


def within(sequences: Sequences, domain: Range) -> Sequences:
    """Return the items of each sequence that are of the domain."""
    return filtered(sequences, inside(sequences.item, domain))


def windows(starts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the first place and the length of the newest `most` items of each sequence, [S] each."""
    length = starts.diff().clamp(max=most)
    return starts[1:] - length, length


def padded(item: Tensor, first_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return items [B, L], padded at the end with item 0, and which of them are real, bool [B, L].

    Where every query attends to its past alone, padding at the end needs no mask: it is in nobody's past.
    """
    place_L = torch.arange(max(int(length_B.max()), 1) if len(length_B) else 1, device=item.device)
    real_BL = place_L < length_B[:, None]
    place_BL = (first_B[:, None] + place_L).clamp(max=max(len(item) - 1, 0))
    return item[place_BL].masked_fill(~real_BL, 0), real_BL


def batches(length_S: Tensor, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield the numbers of all sequences once, in random batches of sequences of about the same length."""
    length = length_S.cpu().numpy()
    order = rng.permutation(len(length))
    groups = []
    for start in range(0, len(order), size * _CHUNK):
        chunk = order[start : start + size * _CHUNK]
        chunk = chunk[np.argsort(length[chunk], kind="stable")]
        groups += [chunk[at : at + size] for at in range(0, len(chunk), size)]
    for number in rng.permutation(len(groups)):
        yield torch.from_numpy(groups[number]).to(length_S.device)


# --- labels -------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Bag:
    """Items of some rows: padded at the end with item 0, [B, L], and which are real, bool [B, L]; rows may be empty."""

    item: Tensor
    real: Tensor

    def kept(self, kept: Tensor) -> Bag:
        """Return the bag without the items that `kept`, bool [B, 1] or [B, L], leaves out."""
        return Bag(self.item, self.real & kept)

    @property
    def length(self) -> Tensor:
        """Return the number of real items of each row, [B]."""
        return self.real.sum(dim=1)


def both(one: Bag, other: Bag) -> Bag:
    """Return the items of two bags in one."""
    return Bag(torch.cat([one.item, other.item], dim=1), torch.cat([one.real, other.real], dim=1))


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


def newest(sequences: Sequences, row_B: Tensor, count_B: Tensor, most: int) -> Bag:
    """Return the newest `most` of the first `count` items of each of these sequences."""
    length_B = count_B.clamp(max=most)
    if not len(sequences.item):
        nothing = torch.zeros(len(row_B), 1, dtype=torch.int64, device=row_B.device)
        return Bag(nothing, nothing.bool())
    return Bag(*padded(sequences.item, sequences.starts[row_B] + count_B - length_B, length_B))


def newest_of_each(history: Sequences, domain: Range, most: int) -> Bag:
    """Return the newest `most` items of the domain in each history."""
    part = within(history, domain)
    return newest(part, torch.arange(len(part), device=history.device), part.lengths, most)


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


# --- negatives and losses -----------------------------------------------------------------------------------------


def draw_shared(domains: Sequence[Range], count: int, rng: np.random.Generator) -> Tensor:
    """Draw `count` items of each domain, evenly, for all labels of a batch: int64 [P, K]."""
    return torch.from_numpy(np.stack([rng.integers(*domain, count) for domain in domains]))


def draw_weighted(
    domains: Sequence[Range], count: int, rng: np.random.Generator, weight_I: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw `count` items of each domain by their weights, and return with them 1 / chance of each: [P, K] both."""
    drawn, inverse = [], []
    for low, high in domains:
        chance = weight_I[low:high].double().cpu().numpy()
        chance = chance / chance.sum()
        place = rng.choice(high - low, count, p=chance)
        drawn.append(low + place)
        inverse.append(1 / chance[place])
    return torch.from_numpy(np.stack(drawn)), torch.from_numpy(np.stack(inverse)).float()


class Unseen:
    """Even draws among the items of a label's own domain that its training sequence does not hold.

    The r-th free item of a domain is r + (taken items before it); a taken item t, the j-th of its sequence and domain, is
    before it where t - j <= r. So one sorted search replaces drawing until an item is free.
    """

    def __init__(self, train: Sequences, domains: Sequence[Range]) -> None:
        self.domains = np.array(sorted(domains))  # [P, 2]
        self.items = int(self.domains.max())
        taken = np.unique((train.row * self.items + train.item).cpu().numpy())
        row, item = np.divmod(taken, self.items)
        domain = self._domain(item)
        group = (row * len(domains) + domain)[domain >= 0]  # ascending, because a row's items are
        self.count = np.bincount(group, minlength=len(train) * len(domains))  # [S P]
        self.first = np.cumsum(self.count) - self.count
        rank = np.arange(len(group)) - self.first[group]
        self.key = group * self.items + item[domain >= 0] - self.domains[domain[domain >= 0], 0] - rank

    def draw(self, row_N: Tensor, label_N: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return `count` items for each label of sequence `row`, int64 [N, K]."""
        domain = self._domain(label_N.cpu().numpy())
        group = row_N.cpu().numpy() * len(self.domains) + domain
        low, high = self.domains[domain].T
        free_NK = rng.integers((high - low - self.count[group])[:, None], size=(len(group), count))
        before = np.searchsorted(self.key, (group * self.items)[:, None] + free_NK, side="right")
        drawn_NK = low[:, None] + free_NK + before - self.first[group][:, None]
        return torch.from_numpy(drawn_NK).to(label_N.device)

    def _domain(self, item: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of each item's domain in `domains`, -1 for none."""
        found = (item[:, None] >= self.domains[:, 0]) & (item[:, None] < self.domains[:, 1])
        return np.where(found.any(axis=1), found.argmax(axis=1), -1)


def distinct(items: int, *numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the distinct item numbers [U], ascending, and for each tensor the places of its numbers among them.

    Looking every item up once is what makes a step cheap: the gradient of each look-up is as large as the table.
    """
    wanted_I = torch.zeros(items, dtype=torch.bool, device=numbers[0].device)
    for number in numbers:
        wanted_I[number] = True
    place_I = wanted_I.long().cumsum(0) - 1
    return wanted_I.nonzero().squeeze(1), [place_I[number] for number in numbers]


def picked(vector_UD: Tensor, place: Tensor) -> Tensor:
    """Return `vector_UD[place]`, [..., D], at less than half the cost of indexing and its gradient.

    On a GPU the gradient's sums are in no fixed order: last bits may differ from run to run.
    """
    return vector_UD.index_select(0, place.flatten()).view(*place.shape, vector_UD.shape[1])


def softmax_loss(
    state_ND: Tensor, label_N: Tensor, label_ND: Tensor, domains: Sequence[Range], drawn_PK: Tensor, drawn_PKD: Tensor,
    inverse_PK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the mean over labels of `next_item_loss` among the drawn items of their own domain.

    `inverse_PK`: 1 / chance of each drawn item; None: they were drawn evenly.
    """
    loss = state_ND.new_zeros(())
    for place, (low, high) in enumerate(domains):
        chosen = inside(label_N, (low, high)).nonzero().squeeze(1)
        inverse = high - low if inverse_PK is None else inverse_PK[place]
        loss = loss + next_item_loss(
            state_ND[chosen], label_N[chosen], label_ND[chosen], drawn_PK[place], drawn_PKD[place], inverse
        )
    return loss / len(label_N)


def next_item_loss(
    state_ND: Tensor, label_N: Tensor, label_ND: Tensor, drawn_K: Tensor, drawn_KD: Tensor, inverse_chance: int | Tensor
) -> Tensor:
    """Return the sum of -log p(label) over a softmax of the label and K drawn items, which stand for all of its domain.

    `inverse_chance`: 1 / q of each drawn item, [K]; for even draws one number, how many items the domain has.
    log(1 / (K q)) is added to their logits (Jean et al. 2015, arXiv 1412.2007); a drawn label is left out.
    """
    label_score_N = (state_ND * label_ND).sum(dim=-1)
    share = inverse_chance / len(drawn_K)
    shift = share.log() if isinstance(share, Tensor) else math.log(share)
    drawn_NK = (state_ND @ drawn_KD.T + shift).masked_fill(drawn_K == label_N[:, None], -torch.inf)
    return (torch.logaddexp(label_score_N, drawn_NK.logsumexp(dim=1)) - label_score_N).sum()


def bce_loss(state_ND: Tensor, label_ND: Tensor, drawn_NKD: Tensor) -> Tensor:
    """Return the mean over labels of -log sigma(s+) - mean_k log(1 - sigma(s_k)) (SASRec eq. 10 at K = 1)."""
    label_score_N = (state_ND * label_ND).sum(dim=-1)
    drawn_NK = torch.einsum("nd,nkd->nk", state_ND, drawn_NKD)
    return functional.softplus(-label_score_N).mean() + functional.softplus(drawn_NK).mean()


class TargetLoss:
    """Loss of labels of the target domain: `bce`, each against a drawn item that its user has not, or `softmax`, all of
    them against the same drawn items.
    """

    def __init__(self, task: SequenceTask, loss: str, negatives: int, rng: np.random.Generator) -> None:
        self.target, self.loss, self.negatives, self.rng = task.target, loss, negatives, rng
        self.unseen = Unseen(task.train, [task.target])

    def __call__(self, user_ND: Tensor, row_N: Tensor, label_N: Tensor, vectors: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over the labels of the sequences `row`; `vectors` of items [K] -> what users are multiplied by, [K, D]."""
        if self.loss == "bce":
            drawn = self.unseen.draw(row_N, label_N, 1, self.rng)
        else:
            drawn = draw_shared([self.target], self.negatives, self.rng)[0].to(label_N.device)
        label_ND, drawn_KD = vectors(torch.cat([label_N, drawn.flatten()])).tensor_split([len(label_N)])
        if self.loss == "bce":
            return bce_loss(user_ND, label_ND, drawn_KD[:, None])
        size = self.target[1] - self.target[0]
        return next_item_loss(user_ND, label_N, label_ND, drawn, drawn_KD, size) / len(label_N)


def contrast(one_BD: Tensor, other_BD: Tensor, temperature: float, label_B: Tensor | None = None) -> Tensor:
    """Return the mean over 2B vectors of -log softmax of a vector's partner among all vectors but itself (InfoNCE).

    Similarity is the dot product / temperature; normalise the vectors before where it is to be the cosine. `label_B`: rows
    of the same label are left out of each other's denominators.
    """
    B = len(one_BD)
    both = torch.cat([one_BD, other_BD])
    partner = torch.arange(2 * B, device=both.device).roll(B)
    left_out = torch.eye(2 * B, dtype=torch.bool, device=both.device)
    if label_B is not None:
        label = torch.cat([label_B, label_B])
        left_out = (label[:, None] == label).scatter(1, partner[:, None], value=False)
    logits = (both @ both.T / temperature).masked_fill(left_out, -torch.inf)
    return functional.cross_entropy(logits, partner)


def contrast_with(one_BD: Tensor, other_BD: Tensor, temperature: float, label_B: Tensor) -> Tensor:
    """Return the mean over B vectors of -log softmax of their partner among the others' vectors, one way (InfoNCE).

    As in `contrast`; rows of the same label are left out of each other's denominators.
    """
    left_out = (label_B[:, None] == label_B) & ~torch.eye(len(label_B), dtype=torch.bool, device=label_B.device)
    logits = (one_BD @ other_BD.T / temperature).masked_fill(left_out, -torch.inf)
    return functional.cross_entropy(logits, torch.arange(len(label_B), device=label_B.device))


def step(optimiser: Optimizer, loss: Tensor) -> float:
    """Take one step down the gradient and return the loss; FloatingPointError where it is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}; lower lr")
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return value


# --- blocks -------------------------------------------------------------------------------------------------------


def biases_at_zero(network: nn.Module) -> None:
    """Let the biases of all maps start at 0 (ours): torch's are larger than vectors of 0.02, and items would look alike."""
    for part in network.modules():
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


@torch.no_grad()
def start_as_mean(*maps: nn.Linear) -> None:
    """Let maps of P vectors side by side, [..., P D] -> [..., D], start as their mean (ours): users begin near items."""
    for linear in maps:
        width, parts = linear.out_features, linear.in_features // linear.out_features
        linear.weight.copy_(torch.eye(width).repeat(1, parts) / parts)


class Dropout(nn.Dropout):
    """nn.Dropout at a tenth of its time on a CPU, where torch draws a number of 32 bits for each coordinate, one by one.

    Here 16 bits decide, so that the share left out is a multiple of 1 / 65,536, below 1; the rest is scaled by that share.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x where coordinates that are drawn anew each time are 0, of the same shape."""
        if not self.training or self.p == 0:
            return x
        values = 2**16
        left_out = min(round(self.p * values), values - 1)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= left_out - values // 2
        return x * kept.to(x.dtype).mul_(values / (values - left_out))


def attend(query_BHLK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(Q K' / sqrt(width of a head)) V over what the mask allows, and 0 for a query that it allows nothing.

    mask: bool, broadcast to [B, H, L, M]; True: this query may read this key.
    """
    allowed = mask.any(dim=-1, keepdim=True)
    read = functional.scaled_dot_product_attention(query_BHLK, key_BHMK, value_BHMK, attn_mask=mask | ~allowed)
    return read * allowed


def causal(length: int, device: torch.device) -> Tensor:
    """Return the mask with which a position reads itself and those before it, bool [1, 1, L, L]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


class AttentionBlock(nn.Module):
    """Attention, then two maps of each position, both around a residual: x + Dropout(g(LayerNorm(x))).

    `norm`: `pre`, as written, or `post`: LayerNorm(x + Dropout(g(x))). `joined`: whether a linear map joins the heads.
    """

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, *, norm: str = "pre", activation: str = "relu",
        joined: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.post = heads, norm == "post"
        self.dropout = Dropout(dropout)
        self.attention_norm, self.map_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=joined)
        self.key_value = nn.Linear(width, 2 * width, bias=joined)
        self.out = nn.Linear(width, width) if joined else nn.Identity()
        nonlinear = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[activation]
        self.map = nn.Sequential(nn.Linear(width, inner), nonlinear, nn.Linear(inner, width))

    def forward(self, x_BLD: Tensor, mask: Tensor, memory_BMD: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]. `memory`: what is read instead of x itself (cross-attention); it is not normalised."""
        return self._around(x_BLD, self._read(self._normed(x_BLD), mask, memory_BMD))

    def newest(self, x_BLD: Tensor, length_B: Tensor) -> Tensor:
        """[B, L, D] -> [B, D]: what `forward` gives at the last of each row's `length` places, which reads all of them.

        No other place is mapped. (W_Q y)'(W_K x) = (W_K' W_Q y)'x maps the query in the place of all keys, W_V goes behind
        the sum, whose weights add up to 1, and the keys' bias adds the same to all logits of a row.
        """
        B, L, D = x_BLD.shape
        x_ND, normed_BLD, place_L = x_BLD.flatten(0, 1), self._normed(x_BLD), torch.arange(L, device=x_BLD.device)
        column_B = (length_B - 1).clamp(min=0)  # an empty row reads its first place
        last_B = torch.arange(B, device=x_BLD.device) * L + column_B
        key_HKD, value_HKD = self.key_value.weight.view(2, self.heads, -1, D)
        query_BHK = self.query(picked(normed_BLD.flatten(0, 1), last_B)).view(B, self.heads, -1)
        asked_BHD = torch.einsum("bhk,hkd->bhd", query_BHK, key_HKD) / math.sqrt(query_BHK.shape[2])
        beyond = place_L > column_B[:, None, None]
        read_BHD = (asked_BHD @ normed_BLD.mT).masked_fill(beyond, -torch.inf).softmax(dim=2) @ normed_BLD
        read_BD = torch.einsum("bhd,hkd->bhk", read_BHD, value_HKD).reshape(B, D)
        if self.key_value.bias is not None:
            read_BD = read_BD + self.key_value.bias[D:]
        return self._around(picked(x_ND, last_B), self.out(read_BD))

    def _normed(self, x: Tensor) -> Tensor:
        normed: Tensor = x if self.post else self.attention_norm(x)
        return normed

    def _around(self, x: Tensor, read: Tensor) -> Tensor:
        """Both residuals around what was read, [..., D]."""
        x = x + self.dropout(read)
        if self.post:
            x = self.attention_norm(x)
            out: Tensor = self.map_norm(x + self.dropout(self.map(x)))
            return out
        return x + self.dropout(self.map(self.map_norm(x)))  # type: ignore[no-any-return]

    def _read(self, x_BLD: Tensor, mask: Tensor, memory_BMD: Tensor | None) -> Tensor:
        B, L, D = x_BLD.shape
        memory = x_BLD if memory_BMD is None else memory_BMD
        query = self.query(x_BLD).view(B, L, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(memory).view(B, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        read: Tensor = self.out(attend(query, key, value, mask).transpose(1, 2).reshape(B, L, D))
        return read


def principal_components(text_IF: Tensor, width: int, deviation: float) -> Tensor:
    """Return the first principal components of the items' text vectors as start of an ID table (ours): [I, width].

    An item that was seen a few times starts near those that read like it, instead of at random.
    """
    centred = text_IF - text_IF.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred.T @ centred / len(centred))
    components = centred @ directions[:width].T
    out = torch.zeros(len(text_IF), width, device=text_IF.device)
    out[:, : components.shape[1]] = components / components.std().clamp(min=1e-6) * deviation
    return out


# --- scores of all items ------------------------------------------------------------------------------------------


def by_length(history: Sequences, most: int, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return `encode` of the newest `most` items of each history, none of them empty: [R, D].

    `encode` takes items [B, L] and lengths [B], of a few hundred histories of about the same length.
    """
    first, length = windows(history.starts, most)
    order = length.argsort(stable=True)
    parts = [
        encode(padded(history.item, first[part], length[part])[0], length[part]) for part in torch.split(order, _ROWS)
    ]
    return torch.cat(parts)[order.argsort()]


class Ranker(Protocol):
    """A network that ranks by the inner product of a user's and an item's vector."""

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Return the vectors of users for a domain's items, by their histories, none of them empty: [R, D]."""

    def items(self, domain: Range) -> Tensor:
        """Return the vectors of a domain's items, [J, D]."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """The `predict` of an epoch, and what is kept of it for serving.

    Where nothing of a history is read, since it is empty or holds no item of the domain that the model reads, items are
    ranked by popularity.
    """

    network: Ranker
    target: Range
    sequences: str  # merged: the whole history is read | target: its target-domain items
    popularity: Tensor  # float32 [J] training sequences with the item
    turned: Scorer | None = None  # for the opposite direction, where one training serves both

    @staticmethod
    def of_task(network: Ranker, task: SequenceTask, sequences: str) -> Scorer:
        """Return a scorer with the popularity of a task's training sequences."""
        counts = torch.bincount(task.train.item, minlength=task.items).float()

        def of_domain(domain: Range, turned: Scorer | None = None) -> Scorer:
            popularity = counts[slice(*domain)]
            return Scorer(network=network, target=domain, sequences=sequences, popularity=popularity, turned=turned)

        return of_domain(task.target, of_domain(task.source) if sequences == "merged" else None)

    def __call__(self, held_out: HeldOut, task: SequenceTask, seed: int) -> Tensor:
        """Return the scores of all target-domain items, [R, J]."""
        return self.scores(held_out.history)

    @torch.no_grad()
    def scores(self, history: Sequences) -> Tensor:
        """Return the scores of all target-domain items by what is known of users, [R, J]."""
        if self.sequences == "target":
            history = within(history, self.target)
        known = history.lengths > 0
        scores_RJ = self.popularity.repeat(len(history), 1)
        if known.any():
            rows = known.nonzero().squeeze(1)
            scores_RJ[rows] = self.network.users(history.rows(rows), self.target) @ self.network.items(self.target).T
        return scores_RJ

    def pack(self) -> dict[str, Any]:
        """Return the trained network and what else `unpacked` needs, as tensors and plain values."""
        assert isinstance(self.network, nn.Module)
        return {
            "network": self.network.state_dict(), "target": list(self.target), "sequences": self.sequences,
            "popularity": self.popularity,
        }  # fmt: skip


def unpacked(network: Ranker, state: Mapping[str, Any]) -> Scorer:
    """Return the scorer that `Scorer.pack` has packed, in a new network of the same shape."""
    assert isinstance(network, nn.Module)
    network.load_state_dict(state["network"])
    low, high = state["target"]
    return Scorer(
        network=network.eval(), target=(low, high), sequences=state["sequences"], popularity=state["popularity"]
    )  # fmt: skip
