"""Simple predictors: what a model has to beat to be of use. Each is a row of every table.

All know the training ratings only. Shapes: N ratings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainables.tasks.rating import HeldOut, Task


def global_mean(held_out: HeldOut, task: Task) -> Tensor:
    """Mean of the training ratings, [N]."""
    return torch.full(held_out.ratings.item.shape, task.mean)


def item_mean(held_out: HeldOut, task: Task) -> Tensor:
    """Shrunken mean of the item's training ratings, [N]."""
    return task.mean + task.item_offset[held_out.ratings.item]


def source_offset(held_out: HeldOut, task: Task) -> Tensor:
    """Item mean plus the user's shrunken source-domain offset times a slope fitted on training users, [N]."""
    return item_mean(held_out, task) + task.slope * held_out.source_offset[held_out.ratings.user]


PREDICTORS: dict[str, Callable[[HeldOut, Task], Tensor]] = {
    "global_mean": global_mean,
    "item_mean": item_mean,
    "source_offset": source_offset,
}


def as_predict(name: str) -> Callable[[HeldOut, Task, int], Tensor]:
    """The predictor in the form of a model's `predict`."""

    def predict(held_out: HeldOut, task: Task, seed: int) -> Tensor:
        return PREDICTORS[name](held_out, task)

    return predict
