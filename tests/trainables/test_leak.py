"""No leak, bit for bit: what test users rated and wrote in the target domain changes nothing that a search can see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from features.store.tables import open_table
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import load_held_out, load_task
from trainables.trial import Report, run

from .worlds import DISLIKED, LIKED, World, build

CONFIGS = [  # of every rating model, and of what each learns from another part of the task
    ("music", {"epochs": 6, "patience": 3, "feature_epochs": 3, "side_epochs": 3, "lr": 1e-2}),
    ("emcdr", {"dim": 3}),
    ("emcdr", {"dim": 3, "rating_offset": "item_mean", "mapping": "mlp", "epochs": 6, "lr": 1e-2}),
    ("emcdr", {"dim": 3, "rating_offset": "none", "calibrate": False}),
    ("cmf", {"dim": 3, "rating_offset": "item_mean", "epochs": 4}),
    ("sscdr", {"dim": 3, "hops": 3, "epochs": 3}),
    ("lacdr", {"dim": 3, "epochs": 3}),
    ("ptupcdr", {"dim": 3, "rating_offset": "item_mean", "epochs": 3}),
    ("diffcdr", {"dim": 3, "epochs": 3}),
]


def inverted(reviews: pd.DataFrame) -> pd.DataFrame:
    """Every rating upside down, every text another one."""
    return reviews.assign(rating=6 - reviews["rating"], text=[f"{LIKED} {DISLIKED} {i}" for i in range(len(reviews))])


def users_of(folder: Path) -> list[str]:
    return [str(name) for name in np.load(folder / "user_id.npy")]


def contents(folder: Path) -> dict[str, Any]:
    """Every file under `folder`; a feature table elsewhere is replaced by the rows of it that are used."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".json" and (meta := json.loads(path.read_text())).get("vectors"):
            rows = np.load(path.with_name(f"{path.stem}_rows.npy"))
            table = open_table((path.parent / meta["vectors"]).parent)
            found[f"{name} rows"] = np.asarray(table.vectors[rows]).tobytes()
            found[name] = json.dumps({**meta, "vectors": None}).encode()
    return found


def reports(folders: TaskFolders, model: str, config: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    def plain(report: Report) -> tuple[int, dict[str, float]]:
        return report.epoch, {name: value for name, value in report.metrics.items() if "seconds" not in name}

    return [plain(report) for report in run(model, config, str(folders.task_dir), [0, 1])]


@pytest.fixture(scope="module")
def changed(
    world: World, feature_set: str, folders: TaskFolders, tmp_path_factory: pytest.TempPathFactory
) -> TaskFolders:
    """The same task after every target rating and review of its test users was turned over."""
    other = world.with_target(users_of(folders.test_dir), inverted)
    return build(other, tmp_path_factory.mktemp(f"changed-{feature_set}"), feature_set)


def test_the_change_reached_the_data_and_the_test_side(folders: TaskFolders, changed: TaskFolders) -> None:
    """Otherwise the tests below would prove nothing."""
    assert folders.key != changed.key
    before, after = load_held_out(folders.test_dir).ratings, load_held_out(changed.test_dir).ratings
    assert before.rating.add(after.rating).unique().tolist() == [6.0]


def test_test_users_change_no_file_of_the_search_side(folders: TaskFolders, changed: TaskFolders) -> None:
    before, after = contents(folders.task_dir), contents(changed.task_dir)
    assert list(before) == list(after)
    assert [name for name in before if before[name] != after[name]] == []
    assert {"target_vectors.npy", "source_user.npy", "source_item.npy", "source_rating.npy"} <= set(before)
    assert "validation/source_row.npy" in before


@pytest.mark.parametrize(("model", "config"), CONFIGS)
def test_test_users_change_no_loss_no_validation_score_and_no_selected_epoch(
    folders: TaskFolders, changed: TaskFolders, model: str, config: dict[str, Any]
) -> None:
    before, after = reports(folders, model, config), reports(changed, model, config)
    assert before == after
    assert {"val_rmse", "val_ndcg20", "train_loss", "variance_ratio", "selected_epoch"} <= set(before[-1][1])
    assert not any(name.startswith("test") for _, metrics in before for name in metrics)


def test_test_users_change_nothing_but_the_truth_on_the_test_side(folders: TaskFolders, changed: TaskFolders) -> None:
    before, after = contents(folders.test_dir), contents(changed.test_dir)
    assert [name for name in before if before[name] != after[name]] == ["rating.npy"]
    assert "source_row.npy" in before


def test_validation_users_change_no_training_tensor(
    world: World, feature_set: str, folders: TaskFolders, tmp_path: Path
) -> None:
    users = users_of(folders.task_dir / "validation")
    other = build(world.with_target(users, inverted), tmp_path, feature_set)
    before, after = contents(folders.task_dir), contents(other.task_dir)
    assert list(before) == list(after)
    assert [name for name in before if before[name] != after[name]] == ["validation/rating.npy"]
    assert contents(folders.test_dir) == contents(other.test_dir)


def test_no_rating_that_is_hidden_from_training_is_in_any_array_of_ratings(folders: TaskFolders, world: World) -> None:
    """Counted: target-domain ratings of held-out users are stored once, where they are to be predicted."""
    task, test = load_task(folders.task_dir), load_held_out(folders.test_dir)
    assert len(task.source_ratings) == len(world.source)
    assert len(task.train) + len(task.validation.ratings) + len(test.ratings) == len(world.target)
    stored = {path.name for folder in (folders.task_dir, folders.test_dir) for path in folder.rglob("*rating*.npy")}
    assert stored == {"rating.npy", "source_rating.npy"}


def test_what_the_same_users_did_in_the_source_domain_does_change_their_vectors(
    world: World, feature_set: str, folders: TaskFolders, tmp_path: Path
) -> None:
    """A cold-start user is known by his source domain: the comparison above is not blind."""
    users = users_of(folders.test_dir)
    source = world.source.copy()
    chosen = source["user_id"].isin(users)
    source.loc[chosen] = inverted(source[chosen])
    other = build(World(source, world.target, world.items), tmp_path, feature_set)
    before, after = load_held_out(folders.test_dir), load_held_out(other.test_dir)
    assert not before.source_offset.equal(after.source_offset)
    earlier, later = (load_task(built.task_dir).source_ratings for built in (folders, other))
    assert torch.equal(earlier.user, later.user)
    turned = torch.isin(earlier.user, before.source_row)
    assert torch.equal(torch.where(turned, 6 - earlier.rating, earlier.rating), later.rating)
    index = before.ratings.user.unique()
    assert float((before.source[index] - after.source[index]).abs().mean()) > 0.05
