"""Parts of sequences, and how they are read: one domain's items, the newest ones, padded batches, bags of items.

Shapes: S sequences, N items of all, B sequences or rows of a batch, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainables.tasks.sequential import Sequences

_CHUNK = 64  # batches that are sorted by length together, so that a batch pads little
Range = tuple[int, int]
"""First item number of a domain, and the number after its last."""


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

    def packed(self) -> Packed:
        """Return the real items alone."""
        row_N, column_N = self.real.nonzero(as_tuple=True)
        return Packed(item=self.item[row_N, column_N], row=row_N, rows=len(self.item))


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Items of some rows, one after the other; rows may be empty."""

    item: Tensor  # int64 [N]
    row: Tensor  # int64 [N] row of each item
    rows: int  # B

    def sum(self, value_NK: Tensor) -> Tensor:
        """Return the sum over each row's items, [N, K] -> [B, K]."""
        return value_NK.new_zeros(self.rows, value_NK.shape[1]).index_add(0, self.row, value_NK)


def both(one: Bag, other: Bag) -> Bag:
    """Return the items of two bags in one."""
    return Bag(torch.cat([one.item, other.item], dim=1), torch.cat([one.real, other.real], dim=1))


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
