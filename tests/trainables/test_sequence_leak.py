"""No leak, byte for byte: nothing that held-out users did changes what training reads, or what pseudo-items are made of."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import load_held_out, load_task
from trainables.tasks.sequential_build import training_users

from .sequence_worlds import SPEC, SequenceWorld, build_world, make_sequence_world, sequence_domains

DIRECTIONS = ("film-song", "song-film")
WORLD = make_sequence_world(items=32)  # so few that none of them is a test user's alone: the catalogue stays


def names(path: Path) -> list[str]:
    return [str(name) for name in np.load(path)]


def changed(world: SequenceWorld, users: Collection[str], last_only: bool) -> SequenceWorld:
    """Other items of the same domains for these users: all of them, or only the last."""
    table = world.interactions.copy()
    draw = np.random.default_rng(1)
    for user in sorted(users):
        rows = table.index[table["user_id"] == user]
        if last_only:
            rows = rows[[int(table.loc[rows, "position"].argmax())]]
        for domain in ("film", "song"):
            mine = rows[table.loc[rows, "domain"] == domain]
            had = set(world.of(user))
            others = sorted(set(world.interactions.query("domain == @domain")["item_id"]) - had)
            table.loc[mine, "item_id"] = draw.choice(others, len(mine), replace=False)
    assert set(table["item_id"]) == set(world.interactions["item_id"])
    return SequenceWorld(table, world.split)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differing(one: Path, other: Path) -> set[str]:
    before, after = files(one), files(other)
    assert list(before) == list(after)
    return {name for name in before if before[name] != after[name]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskFolders]:
    root = tmp_path_factory.mktemp("as it was")
    return {direction: build_world(WORLD, root, direction=direction) for direction in DIRECTIONS}


@pytest.fixture(scope="module")
def tested(folders: dict[str, TaskFolders]) -> list[str]:
    """Those of both directions."""
    return [user for folder in folders.values() for user in names(folder.test_dir / "user_id.npy")]


@pytest.fixture(scope="module")
def validated(folders: dict[str, TaskFolders]) -> list[str]:
    return [user for folder in folders.values() for user in names(folder.task_dir / "validation" / "user_id.npy")]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_test_users_change_no_file_that_a_search_sees(
    folders: dict[str, TaskFolders], tested: list[str], direction: str, tmp_path: Path
) -> None:
    other = build_world(changed(WORLD, tested, last_only=False), tmp_path, direction=direction)
    assert other.key != folders[direction].key
    assert differing(folders[direction].task_dir, other.task_dir) == set()
    assert differing(folders[direction].test_dir, other.test_dir) == {"item.npy", "target.npy", "candidates.npy"}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_validation_users_change_their_own_rows_alone(
    folders: dict[str, TaskFolders], validated: list[str], direction: str, tmp_path: Path
) -> None:
    other = build_world(changed(WORLD, validated, last_only=False), tmp_path, direction=direction)
    assert differing(folders[direction].task_dir, other.task_dir) == {
        f"validation/{name}.npy" for name in ("item", "target", "candidates")
    }
    assert differing(folders[direction].test_dir, other.test_dir) == set()
    assert load_task(other.task_dir).train_key == load_task(folders[direction].task_dir).train_key


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_target_changes_nothing_of_what_is_shown_of_its_user(
    folders: dict[str, TaskFolders], tested: list[str], direction: str, tmp_path: Path
) -> None:
    other = build_world(changed(WORLD, tested, last_only=True), tmp_path, direction=direction)
    assert differing(folders[direction].test_dir, other.test_dir) == {"target.npy", "candidates.npy"}


def test_held_out_users_are_no_training_users(
    folders: dict[str, TaskFolders], tested: list[str], validated: list[str], tmp_path: Path
) -> None:
    """Nor does what is generated for them or learned from them reach pseudo-items: `training_users` does not know them."""
    domains = sequence_domains(WORLD, tmp_path)
    people = training_users(SPEC, domains["film"], domains["song"], None)
    held_out = {*tested, *validated}
    assert len(held_out) == 16
    for folder in folders.values():
        trained = names(folder.task_dir / "user_id.npy")
        assert trained == list(people.user)
        assert not held_out & set(trained)
    other = sequence_domains(changed(WORLD, held_out, last_only=False), tmp_path / "changed")
    after = training_users(SPEC, other["film"], other["song"], None)
    for name in ("user", "group", "item", "in_target", "starts"):
        np.testing.assert_array_equal(getattr(after, name), getattr(people, name))


def test_training_holds_exactly_what_training_users_did(folders: dict[str, TaskFolders]) -> None:
    """So no held-out interaction, a target least of all, is counted in."""
    for folder in folders.values():
        task, items = load_task(folder.task_dir), names(folder.task_dir / "item_id.npy")
        own = WORLD.interactions[WORLD.interactions["user_id"].isin(names(folder.task_dir / "user_id.npy"))]
        counts = own["item_id"].value_counts()
        found = torch.bincount(task.train.item, minlength=task.items).tolist()
        assert found == [int(counts.get(item, 0)) for item in items]


def test_the_search_side_names_no_test_user_and_holds_no_test_row(
    folders: dict[str, TaskFolders], tested: list[str]
) -> None:
    for folder in folders.values():
        known = names(folder.task_dir / "user_id.npy") + names(folder.task_dir / "validation" / "user_id.npy")
        assert not set(tested) & set(known)
        assert {path.name for path in folder.task_dir.iterdir() if path.is_dir()} == {"validation"}


def test_what_training_users_did_does_change_the_search_side(folders: dict[str, TaskFolders], tmp_path: Path) -> None:
    """The comparisons above are not blind."""
    user = names(folders["film-song"].task_dir / "user_id.npy")[0]
    other = build_world(changed(WORLD, [user], last_only=True), tmp_path)
    assert differing(folders["film-song"].task_dir, other.task_dir) == {"item.npy", "task.json"}
    before, after = load_held_out(folders["film-song"].test_dir), load_held_out(other.test_dir)
    assert before.candidates.equal(after.candidates)
