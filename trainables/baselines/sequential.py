"""Simple scorers of next items: what a model has to beat to be of use. Each is a row of every table.

All know the training sequences only. Items of the shown history come last: as domains are read, a user has an item once,
and on Food-Kitchen they are among the negatives of every fourth (kitchen) or second (food) row. Shapes: R rows, B rows
of a block, C candidates, I items of both domains, J those of the target domain, S training sequences, F feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from trainables.metrics.sequential import sequence_errors
from trainables.tasks.sequential import LAST, HeldOut, SequenceTask, seen

RECENCY = 0.85  # weight of an item of the history against the one after it
MIXES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # weights of title similarity that validation chooses from
_ROWS = 256  # scored at once

Score = Callable[[HeldOut], Tensor]
"""Rows -> scores of all target-domain items, float32 [B, J]."""


def popularity(task: SequenceTask) -> Score:
    """In how many training sequences the item occurs."""
    counts = torch.bincount(task.train.item, minlength=task.items)[slice(*task.target)].float()
    return lambda rows: counts.expand(len(rows), -1)


def item_knn(task: SequenceTask) -> Score:
    """Mean cosine of co-occurrence with the items of the history, RECENCY per step back.

    Cosine of items i and j: sequences with both / sqrt(sequences with i * sequences with j).
    """
    counts = torch.bincount(task.train.item, minlength=task.items).float()
    unit_N = counts[task.train.item].rsqrt()
    unit_SI = _matrix(task.train.item, task.train.row, unit_N, len(task.train), task.items)
    unit_SJ, unit_IS = unit_SI[:, slice(*task.target)].tocsr(), unit_SI.T.tocsr()
    return lambda rows: torch.from_numpy(((_weights(rows, task.items) @ unit_IS) @ unit_SJ).toarray())


def title_similarity(task: SequenceTask) -> Score:
    """Mean cosine of the title's vector with those of the history, RECENCY per step back."""
    unit_IF = normalize(task.titles(), dim=1)
    unit_FJ = unit_IF[slice(*task.target)].T.contiguous()
    return lambda rows: torch.from_numpy(_weights(rows, task.items) @ unit_IF.numpy()) @ unit_FJ


def item_knn_title(task: SequenceTask) -> Score:
    """(1 - w) * item_knn + w * title_similarity, w the one of MIXES with the best validation NDCG@10.

    NDCG@10 is meant as models are selected by it: averaged over protocols.
    """
    knn, title = item_knn(task), title_similarity(task)
    rows = task.validation
    column_RC = rows.candidates.long() - task.target[0]
    hidden_RC = seen(rows.history, task.target).gather(1, column_RC)
    knn_RC, title_RC = (_scored(score, rows).gather(1, column_RC) for score in (knn, title))

    def quality(mix: float) -> float:
        mixed_RC = ((1 - mix) * knn_RC + mix * title_RC).masked_fill(hidden_RC, LAST)
        return sequence_errors(rows, mixed_RC).metrics(task.protocols)["ndcg10"]

    best = max(MIXES, key=quality)
    return lambda rows: (1 - best) * knn(rows) + best * title(rows)


PREDICTORS: dict[str, Callable[[SequenceTask], Score]] = {
    "popularity": popularity,
    "item_knn": item_knn,
    "item_knn_title": item_knn_title,
}


def as_predict(name: str) -> Callable[[HeldOut, SequenceTask, int], Tensor]:
    """The predictor in the form of a model's `predict`: scores of all target-domain items, [R, J]."""
    fitted = lru_cache(maxsize=1)(PREDICTORS[name])

    def predict(held_out: HeldOut, task: SequenceTask, seed: int) -> Tensor:
        return _scored(fitted(task), held_out)

    return predict


def _scored(score: Score, held_out: HeldOut) -> Tensor:
    """Scores block by block, [R, J]."""
    blocks = torch.split(torch.arange(len(held_out)), _ROWS)
    return torch.cat([score(held_out.rows(index_B)) for index_B in blocks])


def _weights(rows: HeldOut, items: int) -> sp.csr_array:
    """RECENCY ** steps back of each item of the history, adding up to 1 a row (0 where it is empty): [B, I]."""
    history = rows.history
    back = history.starts[1:][history.row] - 1 - torch.arange(len(history.item))
    weight = RECENCY ** back.float()
    total = torch.zeros(len(history)).index_add_(0, history.row, weight)
    return _matrix(history.item, history.row, weight / total[history.row], len(rows), items)


def _matrix(item_N: Tensor, row_N: Tensor, value_N: Tensor, rows: int, items: int) -> sp.csr_array:
    """Float32 [rows, items]."""
    value: NDArray[np.float32] = value_N.numpy()
    row: NDArray[np.int64] = row_N.numpy()
    item: NDArray[np.int64] = item_N.numpy()
    return sp.coo_array((value, (row, item)), shape=(rows, items)).tocsr()
