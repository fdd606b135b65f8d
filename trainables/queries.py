"""What a kept model is asked about users: a table with a row for each, and how a task fills it.

The tables travel: through MLflow, over HTTP, from a notebook. So their columns are plain numbers and ids; only
`TaskType.query` makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from features.errors import InputError
from trainables.tasks.arrays import load_array, load_rows, read_meta
from trainables.tasks.sequential import load_held_out

RATING_COLUMNS = {"features": "numbers", "source_offset": "number"}
SEQUENCE_COLUMNS = {"history": "texts"}


def describe_rating_user(task_dir: Path, user: str, history: Sequence[str]) -> pd.DataFrame:
    """Return the raw source-domain vector and offset of a user of both domains; InputError for any other user.

    task_dir: the search folder. history: their source-domain items, which the vector stands for.
    """
    for folder in (task_dir.parent / "test", task_dir / "validation", task_dir):
        ids = np.load(folder / "user_id.npy")[: len(load_rows(folder, "source"))]
        if len(places := np.flatnonzero(ids == user)):
            return _rating_row(folder, int(places[0]))
    raise InputError(f"user {user}: is not among the users of both domains, whose vectors the task holds; take another")


def example_rating_user(task_dir: Path) -> pd.DataFrame:
    """Return what is asked about the first validation user."""
    return _rating_row(task_dir / "validation", 0)


def _rating_row(folder: Path, place: int) -> pd.DataFrame:
    """One user's vector as it was before it was standardised."""
    vectors = load_rows(folder, "source")
    raw = vectors[torch.tensor([place])][0] * vectors.scale + vectors.centre
    offset = float(load_array(folder, "source_offset")[place])
    return pd.DataFrame({"features": [raw.double().tolist()], "source_offset": [offset]})


def describe_sequence_user(task_dir: Path, user: str, history: Sequence[str]) -> pd.DataFrame:
    """Return the history itself: any user who has one can be asked about."""
    return pd.DataFrame({"history": [list(history)]})


def example_sequence_user(task_dir: Path) -> pd.DataFrame:
    """Return what is asked about the first validation user."""
    history = load_held_out(task_dir / "validation").history.rows(torch.tensor([0]))
    ids = np.load(task_dir / "item_id.npy")
    return pd.DataFrame({"history": [[str(item) for item in ids[history.item.numpy()]]]})


def item_table(task_dir: Path) -> pd.DataFrame:
    """Return all items that a model of the task numbers, in that order: columns item_id and in_target.

    Tasks of ratings number the items of the target domain alone.
    """
    ids = np.load(task_dir / "item_id.npy")
    low, high = read_meta(task_dir).get("target", (0, len(ids)))
    number = np.arange(len(ids))
    return pd.DataFrame({"item_id": ids.astype(object), "in_target": (number >= low) & (number < high)})
