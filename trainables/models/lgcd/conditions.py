"""Training rows of LGCD (arXiv 2604.05365): what is known of a user, and the target-domain item that came next.

Real overlapping users give a row at each of their target-domain items, once for every protocol: under `as-given` all
earlier items are the condition's history, under `inter` the earlier source-domain items alone. Pseudo-overlapping
sequences (single-domain users with generated items of the other domain inserted, eq. 6) give one row, at their last
target-domain item. All histories are read by pretrained encoders, so rows are vectors and training touches no
sequence again. Shapes: R rows, D vector width, N items in all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trainables.models.lgcd.encoders import Encoders, represent
from trainables.sequence_tools import within
from trainables.tasks.sequential import OVERLAPPING, Sequences, SequenceTask


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Training rows of one direction."""

    id: Tensor  # float32 [R, D], ID representation of the visible history (eq. 8); 0 where it is not in the condition
    text: Tensor  # float32 [R, D], its text representation; 0 where it is not in the condition
    feature: Tensor  # float32 [R, D], h_tgt: text representation of the earlier target-domain items (eq. 7)
    item: Tensor  # int64 [R], what came next
    real: Tensor  # bool [R]; False for pseudo-overlapping rows, whose condition is one part alone: ID, or text
    has_feature: Tensor  # bool [R]; False where there is no earlier target-domain item

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(**{field.name: getattr(self, field.name).index_select(0, index) for field in fields(self)})

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Rows of all parts, in order."""
        return Rows(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows)})


def real_rows(task: SequenceTask, encoders: Encoders) -> Rows:
    """Rows of the overlapping training users."""
    users = (task.group == OVERLAPPING).nonzero().squeeze(1)
    return _rows(task, encoders, newest(task.train, users, encoders.max_length), pseudo=False, parts=("id", "text"))


def pseudo_rows(
    task: SequenceTask, encoders: Encoders, count: int, min_similarity: float, rng: np.random.Generator, *,
    by_text: bool = False,
) -> Rows:  # fmt: skip
    """Rows of the pseudo-overlapping users: at most `count` generated items each, of at least that similarity.

    by_text: their condition is the text part (for guidance by text alone), not the ID part as the paper has it.
    """
    taken = (task.pseudo[:, :count] >= 0) & (task.similarity[:, :count] >= min_similarity)
    users = taken.any(dim=1).nonzero().squeeze(1)
    own = newest(task.train, users, max(encoders.max_length - count, 1))
    inserted = insert(own, task.pseudo[users, :count], taken[users], rng)
    return _rows(task, encoders, inserted, pseudo=True, parts=("text",) if by_text else ("id",))


def newest(sequences: Sequences, users: Tensor, most: int) -> Sequences:
    """The newest `most` items of the sequences of some users."""
    end = sequences.starts[users + 1]
    length = (end - sequences.starts[users]).clamp(max=most)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    place = torch.arange(int(starts[-1])) + torch.repeat_interleave(end - length - starts[:-1], length)
    return Sequences(item=sequences.item[place], starts=starts)


def insert(own: Sequences, pseudo: Tensor, taken: Tensor, rng: np.random.Generator) -> Sequences:
    """Pseudo-overlapping sequences: `pseudo` [S, n] where `taken`, each put at a random place of its sequence."""
    length = np.diff(own.starts.numpy())
    user, column = (part.numpy() for part in taken.nonzero(as_tuple=True))
    place = np.arange(len(own.item)) - np.repeat(own.starts.numpy()[:-1], length)
    key = np.concatenate([place + 1.0, rng.uniform(0, length[user] + 1)])
    owner = np.concatenate([np.repeat(np.arange(len(length)), length), user])
    order = torch.from_numpy(np.lexsort((key, owner)))
    item = torch.cat([own.item, pseudo[torch.from_numpy(user), torch.from_numpy(column)]])[order]
    counts = np.bincount(owner, minlength=len(length))
    return Sequences(item=item, starts=torch.from_numpy(np.concatenate([[0], counts.cumsum()])))


def _rows(task: SequenceTask, encoders: Encoders, sequences: Sequences, *, pseudo: bool, parts: Sequence[str]) -> Rows:
    inside = (sequences.item >= task.target[0]) & (sequences.item < task.target[1])
    owner = torch.repeat_interleave(torch.arange(len(sequences)), sequences.starts.diff())
    place = inside.nonzero().squeeze(1)  # of every target-domain item
    if pseudo:
        final = torch.ones(len(place), dtype=torch.bool)
        final[:-1] = owner[place][1:] != owner[place][:-1]
        place = place[final]
    # How many items of each kind came before, and where the last of them lies among its kind.
    before = {True: inside.long().cumsum(0) - inside.long(), False: (~inside).long().cumsum(0) - (~inside).long()}
    first = sequences.starts[owner[place]]
    (feature,) = represent(encoders, within(sequences, task.target), last=False, parts=["text"])
    seen = before[True][place] > before[True][first]
    feature = torch.where(seen[:, None], feature[(before[True][place] - 1).clamp(min=0)], 0.0)
    found = []
    for protocol in task.protocols:
        given = protocol == "as-given"
        shown = sequences if given else within(sequences, task.source)
        states = dict(zip(parts, represent(encoders, shown, last=False, parts=parts), strict=True))
        known = place > first if given else before[False][place] > before[False][first]
        at = (place - 1 if given else before[False][place] - 1)[known]
        told = {part: state[at] for part, state in states.items()}
        nothing = torch.zeros_like(told[parts[0]])
        found.append(
            Rows(
                id=told.get("id", nothing),
                text=told.get("text", nothing),
                feature=feature[known],
                item=sequences.item[place[known]],
                real=torch.full((len(at),), not pseudo),
                has_feature=seen[known],
            )
        )
    return Rows.joined(found)
