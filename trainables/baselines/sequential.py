"""Simple baselines of next-item prediction: what a model has to beat to be of use. Each is a row of every table.

They read the training sequences, and one of them titles. Shapes: R rows, C candidates, I items of both domains, J those of
the target domain, S training sequences, F feature width.
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
from trainables.tasks.sequential import LAST, HeldOut, SequenceTask

RECENCY = 0.85  # weight of an item of the history against the one after it
MIXES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # weights of title similarity that validation chooses from

Score = Callable[[HeldOut], Tensor]
"""Rows -> scores of all target-domain items, float32 [R, J]."""


def popularity(task: SequenceTask) -> Score:
    """Count the training sequences in which the item occurs."""
    counts = torch.bincount(task.train.item, minlength=task.items)[slice(*task.target)].float()
    return lambda rows: counts.expand(len(rows), -1)


def item_knn(task: SequenceTask) -> Score:
    """Average the item's cosine of co-occurrence with those of the history, RECENCY per step back.

    Cosine of items i and j: sequences with both / sqrt(sequences with i * sequences with j).
    """
    counts = torch.bincount(task.train.item, minlength=task.items).float()
    unit_N = counts[task.train.item].rsqrt()
    unit_SI = _matrix(task.train.item, task.train.row, unit_N, len(task.train), task.items)
    unit_SJ, unit_IS = unit_SI[:, slice(*task.target)].tocsr(), unit_SI.T.tocsr()
    return lambda rows: torch.from_numpy(((_weights(rows, task.items) @ unit_IS) @ unit_SJ).toarray())


def title_similarity(task: SequenceTask) -> Score:
    """Average the cosine of the title's vector with those of the history, RECENCY per step back."""
    unit_IF = normalize(task.titles(), dim=1)
    unit_FJ = unit_IF[slice(*task.target)].T.contiguous()
    return lambda rows: torch.from_numpy(_weights(rows, task.items) @ unit_IF.numpy()) @ unit_FJ


def item_knn_title(task: SequenceTask) -> Score:
    """Mix (1 - w) * item_knn + w * title_similarity, with the w of MIXES that has the best validation NDCG@10.

    That is the metric by which models are selected: averaged over protocols, and items of the history come last.
    """
    knn, title = item_knn(task), title_similarity(task)
    rows = task.validation
    column_RC = rows.candidates.long() - task.target[0]
    hidden_RC = task.ranked_last(rows.history).gather(1, column_RC)
    knn_RC, title_RC = (score(rows).gather(1, column_RC) for score in (knn, title))

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


NEEDS: dict[str, tuple[str, ...]] = {"item_knn_title": ("titles",)}
"""What a task has to hold beside ids for a baseline, as `NEEDS` of a model says it."""


def as_predict(name: str) -> Callable[[HeldOut, SequenceTask, int], Tensor]:
    """Return a baseline in the form of a model's `predict`: scores of all target-domain items, [R, J]."""
    fitted = lru_cache(maxsize=1)(PREDICTORS[name])
    return lambda held_out, task, seed: fitted(task)(held_out)


def _weights(rows: HeldOut, items: int) -> sp.csr_array:
    """Weigh each item of the history by RECENCY ** steps back; a row adds up to 1, or is 0 where it is empty: [R, I]."""
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
