"""What a kept model is asked about users, as a task says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables.queries import describe_rating_user, describe_sequence_user, item_table
from trainables.task_types import RATINGS, SEQUENCES

from .sequence_worlds import build_world, make_sequence_world
from .worlds import build, make_world


def test_a_rating_user_is_described_by_the_raw_vector_and_offset(tmp_path: Path) -> None:
    task_dir = build(make_world(users=60, overlap=45, items=30, each=10), tmp_path, "ratings").task_dir
    for held_out, folder in (
        (RATINGS.load_held_out(task_dir.parent / "test"), task_dir.parent / "test"),
        (RATINGS.load_held_out(task_dir / "validation"), task_dir / "validation"),
    ):
        user = str(np.load(folder / "user_id.npy")[1])
        asked = describe_rating_user(task_dir, user, [])
        assert {name: list(asked[name]) for name in asked} == {
            "features": [
                (held_out.source[torch.tensor([1])][0] * held_out.source.scale + held_out.source.centre).tolist()
            ],
            "source_offset": [float(held_out.source_offset[1])],
        }
        query = RATINGS.query(asked, {})
        assert query.source_offset.tolist() == [float(held_out.source_offset[1])]
    assert list(RATINGS.example_user(task_dir)) == list(RATINGS.query_columns) == ["features", "source_offset"]
    with pytest.raises(InputError, match="user nobody: is not among the users of both domains"):
        describe_rating_user(task_dir, "nobody", [])


def test_a_sequence_user_is_described_by_the_history(tmp_path: Path) -> None:
    task_dir = build_world(make_sequence_world(0), tmp_path).task_dir
    asked = describe_sequence_user(task_dir, "anybody", ["f001", "f002"])
    assert asked["history"].tolist() == [["f001", "f002"]]
    items = item_table(task_dir)
    numbers = {item: number for number, item in enumerate(items["item_id"])}
    example = SEQUENCES.example_user(task_dir)
    first = SEQUENCES.load_held_out(task_dir / "validation").history.rows(torch.tensor([0]))
    assert SEQUENCES.query(example, numbers).item.tolist() == first.item.tolist()
    assert list(example) == list(SEQUENCES.query_columns) == ["history"]


def test_the_items_that_a_model_numbers(tmp_path: Path) -> None:
    ratings = item_table(build(make_world(users=60, overlap=45, items=30, each=10), tmp_path / "r", "ratings").task_dir)
    assert ratings["in_target"].all(), "tasks of ratings number the items of the target domain alone"
    task = build_world(make_sequence_world(0), tmp_path / "s")
    sequences, (low, high) = item_table(task.task_dir), SEQUENCES.load_task(task.task_dir).target
    assert np.flatnonzero(sequences["in_target"]).tolist() == list(range(low, high))
    assert {item[0] for item in sequences.loc[sequences["in_target"], "item_id"]} == {"s"}
