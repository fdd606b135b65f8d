"""Tasks: who is held out, what every array holds, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from features.domains.ties import tie_hash
from features.errors import InputError
from features.store.tables import FeatureTable
from trainables.task_types import RATINGS
from trainables.tasks.arrays import FeatureRows, TaskFolders
from trainables.tasks.rating import SHRINKAGE, HeldOut, Task, load_held_out, load_task
from trainables.tasks.rating_build import SplitSpec, build_task, split_users

from .sequence_worlds import make_sequence_world, sequence_domains
from .worlds import FACTORS, SPLIT, World, build, domains_of, make_world, random_task, text_vectors


@pytest.fixture(scope="module")
def task(folders: TaskFolders) -> Task:
    return load_task(folders.task_dir)


def ids(folder: Path) -> list[str]:
    return [str(name) for name in np.load(folder / "user_id.npy")]


def shared_users(world: World) -> set[str]:
    return set(world.source["user_id"]) & set(world.target["user_id"])


# --- the split ----------------------------------------------------------------------------------------------------


def test_overlapping_users_are_split_by_the_shares(world: World, folders: TaskFolders) -> None:
    validation, test = ids(folders.task_dir / "validation"), ids(folders.test_dir)
    known, train = ids(folders.task_dir), ids(folders.task_dir)[: folders.counts["train_users"]]
    side = known[folders.counts["train_users"] :]
    assert (len(test), len(validation), len(train)) == (36, 21, 63)  # of 120 at 0.3, then 0.25 of the rest
    assert set(train) | set(validation) | set(test) == shared_users(world)
    assert len(set(train) | set(validation) | set(test)) == 120
    assert set(side) == set(world.target["user_id"]) - shared_users(world)
    assert folders.counts["side_users"] == len(side) == 50
    for part in (train, side, validation, test):
        assert part == sorted(part)


def test_the_order_in_which_users_come_changes_nothing() -> None:
    source, target = [f"u{i}" for i in range(40)], [f"u{i}" for i in range(20, 70)]
    split = split_users(source, target, SPLIT, "here")
    again = split_users(list(reversed(source)), target[7:] + target[:7], SPLIT, "here")
    assert split == again
    assert split_users(source, target, replace(SPLIT, data_seed=1), "here") != split


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_cold_ratio_is_the_share_of_test_users(ratio: float) -> None:
    users = [f"u{i:03d}" for i in range(100)]
    split = split_users(users, users, SplitSpec(cold_ratio=ratio), "here")
    assert len(split.test) == round(100 * ratio)
    assert len(split.validation) == round((100 - len(split.test)) * 0.2)


# --- what the arrays hold -----------------------------------------------------------------------------------------


def held_ratings(world: World, users: list[str]) -> list[tuple[str, str, float]]:
    chosen = world.target[world.target["user_id"].isin(users)]
    return sorted(zip(chosen["user_id"], chosen["item_id"], chosen["rating"], strict=True))


def stored_ratings(folder: Path, items: np.ndarray) -> list[tuple[str, str, float]]:
    names = ids(folder)
    user, item, rating = (np.load(folder / f"{name}.npy") for name in ("user", "item", "rating"))
    return sorted((names[u], str(items[i]), float(r)) for u, i, r in zip(user, item, rating, strict=True))


def test_every_target_rating_is_on_exactly_one_side(world: World, folders: TaskFolders) -> None:
    items = np.load(folders.task_dir / "item_id.npy")
    assert list(items) == sorted(set(world.target["item_id"]))
    for folder in (folders.task_dir, folders.task_dir / "validation", folders.test_dir):
        assert stored_ratings(folder, items) == held_ratings(world, ids(folder))
    assert folders.counts["test_ratings"] == len(np.load(folders.test_dir / "rating.npy"))


def test_ratings_are_sorted_and_the_overlapping_users_come_first(task: Task) -> None:
    for ratings in (task.train, task.overlapping, task.validation.ratings):
        assert bool((ratings.user.diff() >= 0).all())
        starts = ratings.starts
        for user in ratings.user.unique():
            assert set(ratings.user[starts[user] : starts[user + 1]].tolist()) == {int(user)}
    assert int(task.overlapping.user.max()) < len(task.source) <= int(task.train.user[len(task.overlapping)])


def test_mean_offsets_and_slope_against_loops(world: World, folders: TaskFolders, task: Task) -> None:
    train = world.target[world.target["user_id"].isin(ids(folders.task_dir))]
    mean = train["rating"].mean()
    assert task.mean == pytest.approx(mean)
    items = [str(name) for name in np.load(folders.task_dir / "item_id.npy")]
    item_offset = {}
    for name in items:
        own = train.loc[train["item_id"] == name, "rating"]
        item_offset[name] = (own - mean).sum() / (len(own) + SHRINKAGE)
        assert float(task.item_offset[items.index(name)]) == pytest.approx(item_offset[name], abs=1e-6)

    users = ids(folders.task_dir)[: len(task.source)]
    offset = dict(zip(users, task.source_offset.tolist(), strict=True))
    rows = train[train["user_id"].isin(users)]
    x = rows["user_id"].map(offset)
    y = rows["rating"] - mean - rows["item_id"].map(item_offset)
    assert task.slope == pytest.approx((x * y).sum() / (x * x).sum(), rel=1e-4)
    assert 0.2 < task.slope < 2


def test_source_offsets_are_shrunken_means_of_what_items_leave(world: World, folders: TaskFolders) -> None:
    """The item part is fitted together with the user part, so a loop to the fixed point must agree."""
    source = world.source.assign(rating=world.source["rating"] - world.source["rating"].mean())
    user_bias = pd.Series(0.0, index=sorted(set(source["user_id"])))
    for _ in range(200):
        left = source.assign(rating=source["rating"] - source["user_id"].map(user_bias)).groupby("item_id")["rating"]
        item_bias = left.sum() / (left.count() + SHRINKAGE)
        left = source.assign(rating=source["rating"] - source["item_id"].map(item_bias)).groupby("user_id")["rating"]
        user_bias = left.sum() / (left.count() + SHRINKAGE)
    for folder in (folders.task_dir / "validation", folders.test_dir):
        expected = user_bias.loc[ids(folder)]
        np.testing.assert_allclose(np.load(folder / "source_offset.npy"), expected, atol=2e-3)


def test_cold_items_are_those_without_a_training_rating(tmp_path: Path) -> None:
    world = make_world(seed=2, users=60, overlap=40, items=120, each=6)
    folders = build(world, tmp_path, "ratings", SplitSpec(cold_ratio=0.5))
    trained = set(np.load(folders.task_dir / "item.npy").tolist())
    for folder in (folders.task_dir / "validation", folders.test_dir):
        expected = [int(item) not in trained for item in np.load(folder / "item.npy")]
        assert np.load(folder / "cold_item.npy").tolist() == expected
    assert np.load(folders.test_dir / "cold_item.npy").any()


# --- the source side ----------------------------------------------------------------------------------------------


def source_users(world: World, folders: TaskFolders) -> list[str]:
    """Source users in the order of the task: training overlapping users, then all others by id."""
    train = ids(folders.task_dir)[: folders.counts["train_users"]]
    return [*train, *sorted(set(world.source["user_id"]) - set(train))]


def test_source_ratings_are_those_of_all_source_users(world: World, folders: TaskFolders, task: Task) -> None:
    items = sorted(set(world.source["item_id"]))
    user, item, rating = (getattr(task.source_ratings, name).tolist() for name in ("user", "item", "rating"))
    names = source_users(world, folders)
    assert list(zip(user, item, strict=True)) == sorted(zip(user, item, strict=True))
    stored = {(names[u], items[i], r) for u, i, r in zip(user, item, rating, strict=True)}
    columns = world.source[["user_id", "item_id", "rating"]]
    assert stored == set(columns.itertuples(index=False, name=None))
    assert (len(user), task.source_items) == (len(columns), len(items))
    assert task.source_ratings.user.dtype == task.source_ratings.item.dtype == torch.int64
    assert task.source_ratings.rating.dtype == torch.float32


def test_held_out_users_are_found_in_the_source_ratings(world: World, folders: TaskFolders, task: Task) -> None:
    names, test = source_users(world, folders), load_held_out(folders.test_dir)
    for held_out, folder in ((task.validation, folders.task_dir / "validation"), (test, folders.test_dir)):
        assert [names[row] for row in held_out.source_row.tolist()] == ids(folder)
        assert len(held_out.source_row) == len(held_out.source)
        assert int(held_out.source_row.min()) >= len(task.source)


def test_source_ratings_are_in_order_of_time_where_there_are_times(world: World, tmp_path: Path) -> None:
    times = np.random.default_rng(5).integers(1, 4, len(world.source))
    timed = replace(world, source=world.source.assign(timestamp=times))
    folders = build(timed, tmp_path, "ratings")
    task, names = load_task(folders.task_dir), source_users(world, folders)
    assert (task.source_times, load_task(build(world, tmp_path / "untimed", "ratings").task_dir).source_times) == (
        True,
        False,
    )
    order = timed.source.assign(row=timed.source["user_id"].map({name: row for row, name in enumerate(names)}))
    order["tie"] = [
        tie_hash(user, item, "source", SPLIT.data_seed)
        for user, item in zip(order["user_id"], order["item_id"], strict=True)
    ]
    order = order.sort_values(["row", "timestamp", "tie"])
    assert task.source_ratings.user.tolist() == order["row"].tolist()
    assert task.source_ratings.rating.tolist() == order["rating"].tolist()
    assert order["item_id"].map(sorted(set(order["item_id"])).index).tolist() == task.source_ratings.item.tolist()


# --- vectors ------------------------------------------------------------------------------------------------------


def test_text_vectors_are_each_users_own_centred_and_scaled(world: World, tmp_path: Path) -> None:
    source, target = domains_of(world, tmp_path)
    vectors = text_vectors(source, target, tmp_path)
    folders = build_task(SPLIT, source, target, vectors, tmp_path / "tasks")
    task, test = load_task(folders.task_dir), load_held_out(folders.test_dir)
    train = ids(folders.task_dir)[: len(task.source)]

    def expected(table: FeatureTable, names: list[str], centre_of: list[str]) -> np.ndarray:
        raw = table.vectors.astype(np.float64)
        known = raw[table.rows(centre_of)]
        scale = np.sqrt(((known - known.mean(0)) ** 2).mean())
        return np.asarray((raw[table.rows(names)] - known.mean(0)) / scale)

    def check(rows: FeatureRows, table: FeatureTable, names: list[str], centre_of: list[str]) -> None:
        np.testing.assert_allclose(rows[torch.arange(len(rows))], expected(table, names, centre_of), atol=1e-5)

    check(task.source, vectors.source_users, train, train)
    check(task.validation.source, vectors.source_users, ids(folders.task_dir / "validation"), train)
    check(test.source, vectors.source_users, ids(folders.test_dir), train)
    known, items = ids(folders.task_dir), [str(name) for name in np.load(folders.task_dir / "item_id.npy")]
    check(task.target, vectors.target_users, known, known)
    check(task.items, vectors.items, items, items)


def test_a_full_disk_is_one_line_and_leaves_no_task(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source, target = domains_of(world, tmp_path)
    vectors = text_vectors(source, target, tmp_path)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"^store .*tasks: cannot be written \(No space left on device\); free space"):
        build_task(SPLIT, source, target, vectors, tmp_path / "tasks")
    assert list((tmp_path / "tasks").iterdir()) == []


def test_a_row_without_a_vector_reads_as_the_mean() -> None:
    vectors = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    rows = FeatureRows(vectors, np.array([1, -1, 0]), np.array([1.0, 1.0], np.float32), 2.0)
    assert rows[torch.tensor([0, 1, 2])].tolist() == [[1.0, 1.5], [0.0, 0.0], [0.0, 0.5]]


def test_wide_tables_read_from_disk_as_narrow_ones_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    vectors, centre = draw.normal(size=(50, 9)).astype(np.float16), draw.normal(size=9).astype(np.float32)
    places = np.append(draw.permutation(50)[:30], -1)
    held = FeatureRows(vectors, places, centre, 1.7)
    monkeypatch.setattr("trainables.tasks.arrays.DENSE_BYTES", 0)
    read = FeatureRows(vectors, places, centre, 1.7)
    index = torch.tensor([3, 30, 0, 3, 17])
    assert torch.equal(held[index], read[index])
    assert held[index].dtype == torch.float32
    assert len(held) == 31
    assert held.width == 9


def test_a_task_that_lies_on_a_device_moves_there_as_itself(task: Task) -> None:
    assert task.to(torch.device("cpu")) is task
    there = task.to(torch.device("meta"))
    assert {there.item_offset.device.type, there.validation.ratings.user.device.type} == {"meta"}
    assert there.source[torch.zeros(3, dtype=torch.int64, device="meta")].device.type == "meta"
    assert (there.mean, there.rating_scale) == (task.mean, task.rating_scale)
    assert task.item_offset.device.type == "cpu"


def test_a_build_is_found_again_and_another_split_is_another_task(world: World, tmp_path: Path) -> None:
    source, target = domains_of(world, tmp_path)
    first = build_task(SPLIT, source, target, FACTORS, tmp_path / "tasks")
    before = {path: path.stat().st_mtime_ns for path in first.task_dir.rglob("*")}
    assert build_task(SPLIT, source, target, FACTORS, tmp_path / "tasks") == first
    assert {path: path.stat().st_mtime_ns for path in first.task_dir.rglob("*")} == before
    others = {
        build_task(replace(SPLIT, data_seed=1), source, target, FACTORS, tmp_path / "tasks").key,
        build_task(SPLIT, target, source, FACTORS, tmp_path / "tasks").key,
        build_task(SPLIT, source, target, replace(FACTORS, factors=2), tmp_path / "tasks").key,
    }
    assert len(others - {first.key}) == 3


def test_what_users_add_to_the_errors_on_cold_items_is_their_own() -> None:
    task = random_task(seed=4)
    known = task.validation.ratings
    held_out = replace(task.validation, cold_item=torch.arange(len(known)) % 7 == 0)

    def predict(held_out: HeldOut, task: Task, seed: int) -> torch.Tensor:
        return torch.linspace(0, 7, len(held_out.ratings))  # beyond the scale on both sides

    measured = RATINGS.measure(held_out, predict, task, 0, full=True)
    totals = dict.fromkeys(map(int, measured.columns["user"]), (0, 0.0, 0.0))
    for place in held_out.cold_item.nonzero().flatten().tolist():
        user, error = int(known.user[place]), min(5, max(1, 7 * place / (len(known) - 1))) - float(known.rating[place])
        n, absolute, square = totals[user]
        totals[user] = n + 1, absolute + abs(error), square + error**2
    names = ("cold_n", "cold_sum_abs_error", "cold_sum_squared_error")
    for name, expected in zip(names, zip(*totals.values(), strict=True), strict=True):
        assert measured.columns[name] == pytest.approx(expected, abs=1e-5)
    n, absolute, square = (measured.columns[name].sum() for name in names)
    assert n == measured.metrics["cold_item_n"]
    assert measured.metrics["cold_item_mae"] == pytest.approx(absolute / n)
    assert measured.metrics["cold_item_rmse"] == pytest.approx((square / n) ** 0.5)


def test_without_cutting_errors_are_of_predictions_as_they_are(world: World, tmp_path: Path) -> None:
    """The same task but for this, so that a model and the simple baselines beside it are measured alike."""
    source, target = domains_of(world, tmp_path)
    cut = build_task(SPLIT, source, target, FACTORS, tmp_path / "tasks")
    plain = build_task(replace(SPLIT, clip=False), source, target, FACTORS, tmp_path / "tasks")
    assert cut.key != plain.key
    for folders, reached in ((cut, 5.0), (plain, 9.0)):
        task = load_task(folders.task_dir)
        rating = task.validation.ratings.rating.double()
        assert torch.equal(rating, load_task(cut.task_dir).validation.ratings.rating.double())

        def predict(held_out: HeldOut, task: Task, seed: int) -> torch.Tensor:
            return torch.full((len(held_out.ratings),), 9.0)

        measured = RATINGS.measure(task.validation, predict, task, 0, full=True)
        assert measured.metrics["mae"] == pytest.approx(float((reached - rating).mean()))
        assert measured.metrics["rmse"] == pytest.approx(float((reached - rating).square().mean().sqrt()))
        assert task.rating_scale == (1.0, 5.0)


# --- what a search cannot reach -----------------------------------------------------------------------------------


def test_a_task_has_no_test_data_and_its_folder_does_not_know_where_any_is(folders: TaskFolders, task: Task) -> None:
    assert [field.name for field in fields(Task) if "test" in field.name] == []
    assert [field.name for field in fields(Task) if field.type in ("HeldOut", HeldOut)] == ["validation"]
    test_users = {name.encode() for name in ids(folders.test_dir)}
    for path in folders.task_dir.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        assert str(folders.test_dir).encode() not in content
        # NumPy writes text as UTF-32
        assert not any(name in content or name.decode().encode("utf-32-le") in content for name in test_users), path


def test_the_vectors_of_the_target_side_are_those_of_users_who_may_be_seen(folders: TaskFolders, task: Task) -> None:
    stored = np.load(folders.task_dir / "target_vectors.npy")
    assert len(stored) == len(task.target) == folders.counts["train_users"] + folders.counts["side_users"]
    assert json.loads((folders.task_dir / "target.json").read_text())["vectors"] is None


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.2, True, "0.2", float("nan")])
def test_a_ratio_must_be_a_share(ratio: Any) -> None:
    with pytest.raises(InputError, match=r"^split\.cold_ratio is .*; give a number above 0, below 1$"):
        SplitSpec(cold_ratio=ratio)
    with pytest.raises(InputError, match=r"^split\.validation_share is .*; give a number above 0, below 1"):
        SplitSpec(cold_ratio=0.2, validation_share=ratio)


def test_domains_without_a_shared_user_are_refused(tmp_path: Path) -> None:
    world = make_world(users=20, overlap=5, items=30, each=6)
    apart = replace(world, source=world.source.assign(user_id="x" + world.source["user_id"]))
    source, target = domains_of(apart, tmp_path)
    with pytest.raises(
        InputError,
        match=r"^task source->target: the domains share no user \(after filtering\), ids are 'xu.* and 'u.*; choose",
    ):
        build_task(SPLIT, source, target, FACTORS, tmp_path / "tasks")
    assert list((tmp_path / "tasks").glob("*")) == []


def test_domains_without_ratings_are_refused(tmp_path: Path) -> None:
    film, song = sequence_domains(make_sequence_world(), tmp_path).values()
    with pytest.raises(InputError, match=r"domain film is implicit feedback, without the ratings a task needs; take"):
        build_task(SPLIT, film, song, FACTORS, tmp_path / "tasks")


def test_too_few_users_are_refused_with_what_each_part_would_get() -> None:
    with pytest.raises(
        InputError,
        match=r"^here: 3 overlapping users at cold ratio 0\.2 leave 2 for training, 0 for validation, 1 for test",
    ):
        split_users(["a", "b", "c"], ["a", "b", "c"], SplitSpec(cold_ratio=0.2), "here")


def test_a_folder_without_a_task_is_refused(folders: TaskFolders, tmp_path: Path) -> None:
    for load in (load_task, load_held_out):
        with pytest.raises(InputError, match=r"nowhere: no task is built here; run `study extract` on the plan$"):
            load(tmp_path / "nowhere")


def test_a_feature_table_that_is_gone_is_named(world: World, tmp_path: Path) -> None:
    folders = build(world, tmp_path, "text")
    (tmp_path / "store" / "features").rename(tmp_path / "store" / "moved")
    with pytest.raises(InputError, match=r"search: its vectors .*vectors\.npy are gone; run `study extract`"):
        load_task(folders.task_dir)
