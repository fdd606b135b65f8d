"""Training rows of LGCD (arXiv 2604.05365): what is known of a user, and the target-domain item that came next.

Real overlapping users give a row at each of their target-domain items (ours), or at the last one as in the paper. What
the condition reads: with `condition_from: merged` (ours) a row is there once for every protocol, under `as-given` with all
earlier items, under `inter` with the earlier source-domain items alone; with `source` it reads the latter, once (eq. 8).
Pseudo-overlapping sequences (single-domain users with generated items of the other domain inserted, eq. 6) give one row,
at their last target-domain item. All histories are read by pretrained encoders, so rows are vectors and training touches
no sequence again. Shapes: S sequences, K generated items of a user, N items in all sequences, M labels, R rows (labels
with a visible history), D vector width, T target-domain items among the N, V visible ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from trainables.models.lgcd.encoders import DomainEncoders, represent
from trainables.models.lgcd.retrieval import Suggested
from trainables.sequences.views import filtered, inside
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

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Return the rows of all parts, in order."""
        return Rows(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows)})


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """Which rows sequences give."""

    condition_from: str = "merged"  # merged | source
    rows: str = "every"  # every | last

    def views(self, task: SequenceTask) -> tuple[str, ...]:
        """Return the protocols that a condition is read under: a row is there once for each."""
        return ("inter",) if self.condition_from == "source" else task.protocols


def real_rows(task: SequenceTask, encoders: DomainEncoders, rules: RowRules) -> Rows:
    """Return the rows of the overlapping training users."""
    users = (task.group == OVERLAPPING).nonzero().squeeze(1)
    sequences = newest(task.train, users, encoders.max_length)
    return _rows(task, encoders, sequences, rules, pseudo=False, parts=("id", "text"))


def pseudo_rows(
    task: SequenceTask, encoders: DomainEncoders, suggested: Suggested, rules: RowRules, min_similarity: float,
    rng: np.random.Generator, *, by_text: bool = False,
) -> Rows:  # fmt: skip
    """Return the rows of pseudo-overlapping users: of the suggested items those of at least that similarity.

    by_text: their condition is the text part (for guidance by text alone), not the ID part as the paper has it.
    """
    taken_SK = (suggested.item >= 0) & (suggested.similarity >= min_similarity)
    users = taken_SK.any(dim=1).nonzero().squeeze(1)
    sequences = newest(task.train, users, max(encoders.max_length - taken_SK.shape[1], 1))
    merged = insert(sequences, suggested.item[users], taken_SK[users], rng)
    parts = ("text",) if by_text else ("id",)
    return _rows(task, encoders, merged, replace(rules, rows="last"), pseudo=True, parts=parts)


def newest(sequences: Sequences, users: Tensor, most: int) -> Sequences:
    """Return the newest `most` items of the sequences of some users."""
    end = sequences.starts[users + 1]
    length = (end - sequences.starts[users]).clamp(max=most)
    starts = torch.cat([length.new_zeros(1), length.cumsum(0)])
    shift = torch.repeat_interleave(end - length - starts[:-1], length)
    return Sequences(item=sequences.item[torch.arange(int(starts[-1]), device=shift.device) + shift], starts=starts)


def insert(sequences: Sequences, pseudo_SK: Tensor, taken_SK: Tensor, rng: np.random.Generator) -> Sequences:
    """Return pseudo-overlapping sequences: the items `pseudo` where `taken`, each put at a random place of its sequence."""
    starts = sequences.starts.cpu().numpy()
    length = np.diff(starts)
    pseudo_owner, column = (index.cpu().numpy() for index in taken_SK.nonzero(as_tuple=True))
    place = np.arange(len(sequences.item)) - np.repeat(starts[:-1], length)
    # Sorted by owner, then by key: a sequence's items have the keys 1, 2, ..., and a pseudo-item one in between.
    key = np.concatenate([place + 1.0, rng.uniform(0, length[pseudo_owner] + 1)])
    owner = np.concatenate([np.repeat(np.arange(len(length)), length), pseudo_owner])
    order = torch.from_numpy(np.lexsort((key, owner))).to(sequences.device)
    inserted = pseudo_SK[tuple(torch.from_numpy(index).to(sequences.device) for index in (pseudo_owner, column))]
    counts = np.bincount(owner, minlength=len(length))
    merged_starts = torch.from_numpy(np.concatenate([[0], counts.cumsum()])).to(sequences.device)
    return Sequences(item=torch.cat([sequences.item, inserted])[order], starts=merged_starts)


def _rows(
    task: SequenceTask, encoders: DomainEncoders, sequences: Sequences, rules: RowRules, *, pseudo: bool,
    parts: Sequence[str],
) -> Rows:  # fmt: skip
    """Rows at the target-domain items of merged sequences that have a visible history, once for each view.

    parts: representations that the condition has.
    """
    in_target_N = inside(sequences.item, task.target)
    label_M = _label_places(sequences, in_target_N, last_alone=rules.rows == "last")
    first_M = sequences.starts[sequences.row[label_M]]  # place where the label's sequence starts
    targets = filtered(sequences, in_target_N)
    (earlier_TD,) = represent(encoders.of_domain(task.target), targets, last=False, parts=["text"])
    earlier_M, has_feature_M = _last_before(in_target_N, label_M, first_M)
    feature_MD = torch.where(has_feature_M[:, None], earlier_TD[earlier_M], 0.0)
    rows = []
    for view in rules.views(task):
        visible_N = torch.ones_like(in_target_N) if view == "as-given" else ~in_target_N
        visible = filtered(sequences, visible_N)
        histories = represent(encoders.of_domain(task.source), visible, last=False, parts=parts)  # [V, D] each
        shown_M, has_history_M = _last_before(visible_N, label_M, first_M)
        shown_R = shown_M[has_history_M]
        condition = {part: history_VD[shown_R] for part, history_VD in zip(parts, histories, strict=True)}
        absent_RD = torch.zeros_like(condition[parts[0]])
        rows.append(
            Rows(
                id=condition.get("id", absent_RD),
                text=condition.get("text", absent_RD),
                feature=feature_MD[has_history_M],
                item=sequences.item[label_M[has_history_M]],
                real=torch.full_like(has_history_M[has_history_M], not pseudo),
                has_feature=has_feature_M[has_history_M],
            )
        )
    return Rows.joined(rows)


def _label_places(sequences: Sequences, in_target_N: Tensor, *, last_alone: bool) -> Tensor:
    """Places of the target-domain items, or of the last one of each sequence, [M] among all items of the sequences."""
    place_M = in_target_N.nonzero().squeeze(1)
    if not last_alone:
        return place_M
    owner_M = sequences.row[place_M]
    is_last_M = torch.ones_like(owner_M, dtype=torch.bool)
    is_last_M[:-1] = owner_M[1:] != owner_M[:-1]
    return place_M[is_last_M]


def _last_before(chosen_N: Tensor, label_M: Tensor, first_M: Tensor) -> tuple[Tensor, Tensor]:
    """The last chosen item before each label, as its number among all chosen items, and whether its sequence has one."""
    before_N = chosen_N.long().cumsum(0) - chosen_N.long()  # chosen items before each place
    before_M = before_N[label_M]
    return (before_M - 1).clamp(min=0), before_M > before_N[first_M]
