"""Sequence tasks: order, numbers, groups, rows, negatives, the overlap ratio and pseudo-items."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.domains.domain import DomainSpec, prepare_domain
from features.domains.ties import tie_hash
from features.errors import InputError
from features.pseudo.table import write_pseudo
from features.store.tables import FeatureTable
from trainables.task_types import SEQUENCES
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import (
    OVERLAPPING,
    SOURCE_ONLY,
    TARGET_ONLY,
    HeldOut,
    Sequences,
    SequenceSpec,
    SequenceTask,
    load_held_out,
    load_task,
)
from trainables.tasks.sequential_build import build_sequences, sequence_document, training_users

from .sequence_worlds import (
    SPEC,
    WIDTH,
    SequenceWorld,
    build_world,
    lists,
    make_sequence_world,
    sequence_domains,
    text_of,
)

WORLD = make_sequence_world()
DIRECTIONS = ("film-song", "song-film")


def names(path: Path) -> list[str]:
    return [str(name) for name in np.load(path)]


def sequences_of(folder: Path) -> dict[str, list[str]]:
    """Training user -> item ids, as the task has them."""
    items, task = names(folder / "item_id.npy"), load_task(folder)
    users = names(folder / "user_id.npy")
    return {user: [items[i] for i in row] for user, row in zip(users, lists(task.train), strict=True)}


def rows_of(folder: Path, items: list[str]) -> dict[tuple[str, int], tuple[list[str], str]]:
    """(user, protocol) -> (history, target), in ids."""
    rows, users = load_held_out(folder), names(folder / "user_id.npy")
    return {
        (users[user], protocol): ([items[i] for i in history], items[target])
        for user, protocol, history, target in zip(
            rows.user.tolist(), rows.protocol.tolist(), lists(rows.history), rows.target.tolist(), strict=True
        )
    }


def groups_of(world: SequenceWorld) -> dict[str, set[str]]:
    return {str(user): set(rows["domain"]) for user, rows in world.interactions.groupby("user_id")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskFolders]:
    """The task of WORLD in both directions, by C2DSR's rule."""
    root = tmp_path_factory.mktemp("world")
    return {direction: build_world(WORLD, root, direction=direction) for direction in DIRECTIONS}


# --- who trains, who is held out ----------------------------------------------------------------------------------


def test_training_sequences_are_whole_and_in_the_order_of_both_domains(folders: dict[str, TaskFolders]) -> None:
    for folder in folders.values():
        train = sequences_of(folder.task_dir)
        assert list(train) == sorted(train)
        assert train == {user: WORLD.of(user) for user in train}


def test_each_user_trains_in_both_directions_or_is_held_out_in_one(folders: dict[str, TaskFolders]) -> None:
    parts = {
        direction: {
            "train": set(names(folder.task_dir / "user_id.npy")),
            "validation": set(names(folder.task_dir / "validation" / "user_id.npy")),
            "test": set(names(folder.test_dir / "user_id.npy")),
        }
        for direction, folder in folders.items()
    }
    one, other = parts.values()
    assert one["train"] == other["train"]
    held_out = [parts[direction][name] for direction in DIRECTIONS for name in ("validation", "test")]
    everyone = sorted([*one["train"], *(user for users in held_out for user in users)])
    assert everyone == sorted(set(WORLD.interactions["user_id"]))  # nobody twice, nobody lost
    overlapping = {user for user, domains in groups_of(WORLD).items() if len(domains) == 2}
    for users in held_out:
        assert users <= overlapping
    for name in ("validation", "test"):
        assert len(one[name]) + len(other[name]) == round(0.2 * len(overlapping))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("part", ["validation", "test"])
def test_rows_ask_for_the_last_item_and_show_what_the_protocol_shows(
    folders: dict[str, TaskFolders], direction: str, part: str
) -> None:
    folder = folders[direction]
    place = folder.test_dir if part == "test" else folder.task_dir / "validation"
    target = direction.split("-")[1][0]
    rows = rows_of(place, names(folder.task_dir / "item_id.npy"))
    users = names(place / "user_id.npy")
    assert set(rows) == {(user, protocol) for user in users for protocol in (0, 1)}
    for (user, protocol), (history, wanted) in rows.items():
        *before, last = WORLD.of(user)
        assert wanted == last
        assert last[0] == target
        assert history == (before if protocol == 0 else [item for item in before if item[0] != target])


def test_one_protocol_alone(tmp_path: Path, folders: dict[str, TaskFolders]) -> None:
    spec = replace(SPEC, protocols=("inter",))
    alone = build_world(WORLD, tmp_path, spec)
    both = folders["film-song"]
    items = names(both.task_dir / "item_id.npy")
    assert load_task(alone.task_dir).protocols == ("inter",)
    expected = {(user, 0): row for (user, protocol), row in rows_of(both.test_dir, items).items() if protocol == 1}
    assert rows_of(alone.test_dir, items) == expected


def test_groups_and_numbers(folders: dict[str, TaskFolders]) -> None:
    here, there = (load_task(folders[direction].task_dir) for direction in DIRECTIONS)
    assert (here.source, here.target) == (there.target, there.source)
    assert here.source[0] == 0  # film sorts before song
    assert here.source[1] == here.target[0]
    assert here.target[1] == here.items == len(here.text)
    items = names(here.folder / "item_id.npy")
    assert items == names(there.folder / "item_id.npy") == sorted(items)
    assert here.train.item.equal(there.train.item)
    assert here.train.starts.equal(there.train.starts)
    assert here.pseudo.equal(there.pseudo)
    swapped = {OVERLAPPING: OVERLAPPING, SOURCE_ONLY: TARGET_ONLY, TARGET_ONLY: SOURCE_ONLY}
    assert there.group.tolist() == [swapped[group] for group in here.group.tolist()]
    kinds = {OVERLAPPING: {"film", "song"}, SOURCE_ONLY: {"film"}, TARGET_ONLY: {"song"}}
    domains = groups_of(WORLD)
    for user, group in zip(names(here.folder / "user_id.npy"), here.group.tolist(), strict=True):
        assert kinds[group] == domains[user]


def test_a_given_split_is_kept_and_a_history_may_be_empty(tmp_path: Path) -> None:
    """Held-out users of one domain are rows too, if the data says so; under inter nothing of theirs is shown."""
    parts = dict.fromkeys(WORLD.interactions["user_id"], "train")
    only_songs = sorted(user for user, domains in groups_of(WORLD).items() if domains == {"song"})
    last_song = sorted(user for user in groups_of(WORLD) if WORLD.of(user)[-1][0] == "s" and user not in only_songs)
    last_film = sorted(user for user in groups_of(WORLD) if WORLD.of(user)[-1][0] == "f")
    parts |= {only_songs[0]: "test", only_songs[1]: "valid", last_song[0]: "test", last_song[1]: "valid"}
    parts |= {last_film[0]: "test", last_film[1]: "valid"}
    folder = build_world(replace(WORLD, split=parts), tmp_path)
    assert names(folder.test_dir / "user_id.npy") == sorted([only_songs[0], last_song[0]])
    assert names(folder.task_dir / "validation" / "user_id.npy") == sorted([only_songs[1], last_song[1]])
    assert set(names(folder.task_dir / "user_id.npy")) == {user for user, part in parts.items() if part == "train"}
    rows = rows_of(folder.test_dir, names(folder.task_dir / "item_id.npy"))
    assert rows[only_songs[0], 0][0] == WORLD.of(only_songs[0])[:-1]
    assert rows[only_songs[0], 1][0] == []


def test_users_that_the_split_does_not_name(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"film->song: 60 of 60 users are not in the split, the first is 'u000'; add them"
    ):
        build_world(replace(WORLD, split={"x": "train"}), tmp_path)
    users = sorted(groups_of(WORLD))
    held_out = dict(zip(users, ["test"] * 9 + ["valid"] * 9, strict=False))
    folder = build_world(replace(WORLD, split=held_out), tmp_path, replace(SPEC, unlisted="train"))
    assert names(folder.task_dir / "user_id.npy") == users[18:]
    assert set(names(folder.test_dir / "user_id.npy")) <= set(users[:9])


# --- negatives ----------------------------------------------------------------------------------------------------


def candidates_of(folder: Path) -> dict[str, list[int]]:
    rows, users = load_held_out(folder), names(folder / "user_id.npy")
    found: dict[str, list[int]] = {}
    for user, candidates in zip(rows.user.tolist(), rows.candidates.tolist(), strict=True):
        assert found.setdefault(users[user], candidates) == candidates  # the same under both protocols
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_candidates_are_the_target_and_other_target_items_once_each(
    folders: dict[str, TaskFolders], direction: str
) -> None:
    task = load_task(folders[direction].task_dir)
    for rows in (task.validation, load_held_out(folders[direction].test_dir)):
        assert rows.candidates.dtype == torch.int32
        assert rows.candidates.shape == (len(rows), 1 + SPEC.negatives)
        assert rows.candidates[:, 0].equal(rows.target.int())
        assert bool(((rows.candidates >= task.target[0]) & (rows.candidates < task.target[1])).all())
        assert all(len(set(row)) == len(row) for row in rows.candidates.tolist())


def test_every_other_target_item_can_be_a_negative_and_none_more_than_the_others(tmp_path: Path) -> None:
    songs = WORLD.interactions.query("domain == 'song'")["item_id"].nunique()
    most = build_world(WORLD, tmp_path, replace(SPEC, negatives=songs - 1))
    target = load_task(most.task_dir).target
    for row in candidates_of(most.test_dir).values():
        assert sorted(row) == list(range(*target))
    with pytest.raises(InputError, match=rf"negatives is {songs}, but the target domain has {songs - 1} other items"):
        build_world(WORLD, tmp_path, replace(SPEC, negatives=songs))


def test_negatives_are_drawn_from_the_whole_catalogue_where_it_is_listed(tmp_path: Path) -> None:
    unseen = {f"s{number}" for number in range(900, 940)}
    domains = sequence_domains(WORLD, tmp_path, [("song", item) for item in sorted(unseen)])
    folders = build_sequences(SPEC, domains["film"], domains["song"], None, None, None, tmp_path / "tasks")
    songs = set(WORLD.interactions.query("domain == 'song'")["item_id"])
    items, task = names(folders.task_dir / "item_id.npy"), load_task(folders.task_dir)
    assert set(items[slice(*task.target)]) == songs | unseen
    drawn = {items[number] for number in load_held_out(folders.test_dir).candidates.flatten().tolist()}
    assert len(drawn & unseen) > 20
    assert {item for row in sequences_of(folders.task_dir).values() for item in row}.isdisjoint(unseen)


def test_candidates_depend_on_the_data_seed_and_the_user_alone(tmp_path: Path, folders: dict[str, TaskFolders]) -> None:
    """Users held out under two seeds, or by the rule and by a split, keep or change theirs as the seed says."""
    before = candidates_of(folders["film-song"].test_dir)
    again = build_world(WORLD, tmp_path / "again", replace(SPEC, overlap_ratio=0.5), pseudo=0)
    assert candidates_of(again.test_dir) == before
    users = dict.fromkeys(WORLD.interactions["user_id"], "train")
    some, other = sorted(before)[:2], sorted(before)[2:4]
    split = users | dict.fromkeys(some, "test") | dict.fromkeys(other, "valid")
    given = build_world(replace(WORLD, split=split), tmp_path / "given")
    assert candidates_of(given.test_dir) == {user: before[user] for user in some}
    seeded = build_world(replace(WORLD, split=split), tmp_path / "seeded", replace(SPEC, data_seed=1))
    assert all(candidates_of(seeded.test_dir)[user] != before[user] for user in some)


# --- overlap ratio ------------------------------------------------------------------------------------------------


def test_the_overlap_ratio_cuts_links_and_loses_nothing(tmp_path: Path, folders: dict[str, TaskFolders]) -> None:
    whole = load_task(folders["film-song"].task_dir)
    overlapping = int((whole.group == OVERLAPPING).sum())
    kept: list[set[str]] = []
    for ratio in (0.25, 0.5, 1.0):
        folder = build_world(WORLD, tmp_path, replace(SPEC, overlap_ratio=ratio))
        task, train = load_task(folder.task_dir), sequences_of(folder.task_dir)
        users = names(folder.task_dir / "user_id.npy")
        kept.append({user for user, group in zip(users, task.group.tolist(), strict=True) if group == OVERLAPPING})
        assert len(kept[-1]) == round(ratio * overlapping)
        assert int((task.group != OVERLAPPING).sum()) == int((whole.group != OVERLAPPING).sum()) + 2 * (
            overlapping - len(kept[-1])
        )
        for user in {user.split("@")[0] for user in users}:
            if user in users:
                assert train[user] == WORLD.of(user)
            else:
                assert train[f"{user}@film"] == [item for item in WORLD.of(user) if item[0] == "f"]
                assert train[f"{user}@song"] == [item for item in WORLD.of(user) if item[0] == "s"]
        assert sorted(task.train.item.tolist()) == sorted(whole.train.item.tolist())
        for rows, others in ((task.validation, whole.validation), (load_held_out(folder.test_dir), None)):
            others = others or load_held_out(folders["film-song"].test_dir)
            assert rows.target.equal(others.target)
            assert rows.history.item.equal(others.history.item)
            assert rows.candidates.equal(others.candidates)
    assert kept[0] < kept[1] < kept[2]


def test_a_cut_user_needs_a_free_id(tmp_path: Path) -> None:
    renamed = WORLD.interactions.replace({"user_id": {"u041": f"{cut_user(tmp_path)}@song"}})
    with pytest.raises(InputError, match=r"the user id 'u\d+@song' is needed for half of a user; rename that user"):
        build_world(SequenceWorld(renamed), tmp_path / "clash", replace(SPEC, overlap_ratio=0.25))


def cut_user(folder: Path) -> str:
    people = training_users(replace(SPEC, overlap_ratio=0.25), *pair(folder / "cut"), None)
    return next(user.split("@")[0] for user in people.user if "@" in user)


def pair(folder: Path) -> tuple[Any, Any]:
    domains = sequence_domains(WORLD, folder)
    return domains["film"], domains["song"]


def test_a_ratio_that_leaves_nobody(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"overlap ratio 0.01 leaves none of 24 overlapping users .* a higher ratio"):
        build_world(WORLD, tmp_path, replace(SPEC, overlap_ratio=0.01))


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_training_users_are_those_of_the_task(tmp_path: Path, ratio: float) -> None:
    spec = replace(SPEC, overlap_ratio=ratio)
    film, song = pair(tmp_path)
    people = training_users(spec, film, song, None)
    folder = build_world(WORLD, tmp_path, spec)
    task, train = load_task(folder.task_dir), sequences_of(folder.task_dir)
    assert people.group.tolist() == task.group.tolist()
    parts = np.split(people.item, people.starts[1:-1])
    assert {user: list(items) for user, items in zip(people.user, parts, strict=True)} == train
    assert people.in_target.tolist() == [item[0] == "s" for item in people.item]


# --- pseudo-items and texts ---------------------------------------------------------------------------------------


def test_pseudo_items_are_numbers_of_the_other_domain_in_their_order(tmp_path: Path) -> None:
    film, song = pair(tmp_path)
    people = training_users(SPEC, film, song, None)
    lone = {group: people.user[people.group == group] for group in (SOURCE_ONLY, TARGET_ONLY)}
    rows = {
        "user_id": [lone[SOURCE_ONLY][0], lone[TARGET_ONLY][0], lone[TARGET_ONLY][1]],
        "items": [["s040", "s003"], ["f001", "f017", "f009"], []],
        "similarity": [[0.5, 0.25], [0.75, 0.5, -0.125], []],
        "texts": [["one", "two", "none"], ["two"], []],
        "text_rows": [[1, 0, -1], [0], []],
    }
    vectors = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float16)
    table = write_pseudo(tmp_path / "pseudo", pa.table(rows), vectors, {"key": "a"})
    text = {domain.name: text_of(domain) for domain in (film, song)}
    task = load_task(build_sequences(SPEC, film, song, None, text, table, tmp_path / "tasks").task_dir)
    items, users = names(task.folder / "item_id.npy"), names(task.folder / "user_id.npy")
    assert task.pseudo.shape == task.similarity.shape == (len(users), 3)
    for user, wanted, cosine in zip(rows["user_id"], rows["items"], rows["similarity"], strict=True):
        row = users.index(user)
        assert [items[i] if i >= 0 else None for i in task.pseudo[row].tolist()] == [
            *wanted,
            *[None] * (3 - len(wanted)),
        ]
        assert task.similarity[row].tolist() == [*cosine, *[0.0] * (3 - len(wanted))]
    assert int((task.pseudo >= 0).sum()) == 5
    assert bool((task.pseudo[task.group == OVERLAPPING] == -1).all())
    for user, texts in zip(rows["user_id"], rows["text_rows"], strict=True):
        assert task.generated[users.index(user)].tolist() == [*texts, *[-1] * (3 - len(texts))]
    assert task.text is not None
    assert task.generated_texts is not None
    expected = (torch.from_numpy(vectors).float() - task.text.centre) / task.text.scale  # as titles are standardised
    torch.testing.assert_close(task.generated_texts.all(), expected)
    rows["items"][0][1] = "f001"  # an item of the user's own domain
    table = write_pseudo(tmp_path / "wrong", pa.table(rows), vectors, {"key": "b"})
    with pytest.raises(InputError, match=r"the pseudo-item 'f001' is no item of the domain that its user lacks; make"):
        build_sequences(SPEC, film, song, None, text, table, tmp_path / "tasks")


def test_without_pseudo_items(tmp_path: Path) -> None:
    task = load_task(build_world(WORLD, tmp_path, pseudo=0).task_dir)
    assert task.pseudo.shape == task.similarity.shape == (len(task.train), 0)


def test_text_rows_are_standardised_over_both_domains_and_shared_by_tasks(
    tmp_path: Path, folders: dict[str, TaskFolders]
) -> None:
    film, song = pair(tmp_path)
    raw = np.concatenate([text_of(film).vectors, text_of(song).vectors]).astype(np.float32)
    centred = raw - raw.mean(axis=0)
    here, there = (load_task(folders[direction].task_dir) for direction in DIRECTIONS)
    found = here.titles()
    np.testing.assert_allclose(found.numpy(), centred / np.sqrt((centred**2).mean()), atol=2e-3)
    assert there.titles().equal(found)
    assert len(list(here.folder.parents[1].glob("text-*"))) == 1


def test_an_item_without_a_vector_reads_as_the_mean_and_widths_must_agree(tmp_path: Path) -> None:
    film, song = pair(tmp_path)
    whole = text_of(song)
    less = FeatureTable(whole.path, "less", whole.ids[1:], whole.vectors[1:], whole.manifest)
    text = {"film": text_of(film), "song": less}
    task = load_task(build_sequences(SPEC, film, song, None, text, None, tmp_path / "tasks").task_dir)
    assert task.titles()[task.target[0]].tolist() == [0.0] * 16
    assert bool((task.titles() != 0).any(dim=1).sum() == task.items - 1)
    narrow = FeatureTable(whole.path, "narrow", whole.ids, whole.vectors[:, :5], whole.manifest)
    with pytest.raises(
        InputError, match=r"vectors of \['film', 'song'\] have \[5, 16\] numbers; take one text encoder"
    ):
        build_sequences(SPEC, film, song, None, text | {"song": narrow}, None, tmp_path / "tasks")


def test_how_seen_items_rank_is_kept_in_the_task(tmp_path: Path) -> None:
    """And keys no task where it is the default, as before there was a choice."""
    plain = replace(SPEC, rank_seen="plain")
    assert sequence_document(plain) == {**sequence_document(SPEC), "rank_seen": "plain"}
    assert load_task(build_world(WORLD, tmp_path, plain).task_dir).rank_seen == "plain"
    with pytest.raises(InputError, match=r"sequences.rank_seen is 'first'; choose from last, plain"):
        replace(SPEC, rank_seen="first")


# --- keys ---------------------------------------------------------------------------------------------------------


def test_the_train_key_follows_what_pretraining_reads_and_nothing_else(
    tmp_path: Path, folders: dict[str, TaskFolders]
) -> None:
    def key(spec: SequenceSpec = SPEC, pseudo: int = 3, world: SequenceWorld = WORLD) -> str:
        return load_task(build_world(world, tmp_path / str(len(world.interactions)), spec, pseudo).task_dir).train_key

    here, there = (load_task(folders[direction].task_dir).train_key for direction in DIRECTIONS)
    assert here == there == key()
    assert here == key(replace(SPEC, negatives=5, protocols=("inter",))) == key(pseudo=2)
    others = [key(replace(SPEC, overlap_ratio=0.5)), key(replace(SPEC, data_seed=1))]
    one_less = WORLD.interactions[
        WORLD.interactions["user_id"] != names(folders["film-song"].task_dir / "user_id.npy")[0]
    ]
    others.append(key(world=SequenceWorld(one_less.reset_index(drop=True))))
    assert len({here, *others}) == 4


def test_a_built_task_is_found_again(tmp_path: Path) -> None:
    first = build_world(WORLD, tmp_path)
    before = (first.task_dir / "item.npy").stat().st_mtime_ns
    assert build_world(WORLD, tmp_path) == first
    assert (first.task_dir / "item.npy").stat().st_mtime_ns == before
    counts = {
        "train_overlapping": 24, "train_source_only": 10, "train_target_only": 10, "validation_users": 4, "test_users": 7,
    }  # fmt: skip
    assert counts.items() <= first.counts.items()


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap_ratio": 0}, r"sequences.overlap_ratio is 0; give a number above 0, up to 1"),
        ({"overlap_ratio": "1"}, r"sequences.overlap_ratio is '1'"),
        ({"protocols": ()}, r"sequences.protocols is \(\); give one or more of as-given, inter, each once"),
        ({"protocols": ("inter", "inter")}, r"protocols is \('inter', 'inter'\); give one or more"),
        ({"protocols": ("intra",)}, r"protocols is \('intra',\); give one or more of as-given, inter"),
        ({"negatives": 0}, r"sequences.negatives is 0; give a whole number of at least 1"),
        ({"negatives": 9.0}, r"sequences.negatives is 9.0; give a whole number"),
        ({"test_share": 1.0}, r"sequences.test_share is 1.0; give a number above 0, below 1"),
        ({"validation_share": True}, r"sequences.validation_share is True; give a number above 0, below 1"),
        ({"data_seed": -1}, r"sequences.data_seed is -1; give a whole number of at least 0"),
        ({"test_share": 0.5, "validation_share": 0.5}, r"validation_share and test_share leave nobody to train on"),
        ({"overlap_ratio": 2, "negatives": -1}, r"overlap_ratio is 2; .*; sequences.negatives is -1"),
    ],
)
def test_bad_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceSpec(**change)


def test_domains_need_times_and_two_names(tmp_path: Path) -> None:
    film, song = pair(tmp_path)
    timeless = prepare_domain(
        DomainSpec(
            name="song",
            reader="table",
            interactions="interactions.parquet",
            where={"domain": "song"},
            feedback="implicit",
        ),
        tmp_path / "raw",
        tmp_path / "domains",
    )
    with pytest.raises(
        InputError, match=r"interactions of domain song have no timestamp, .* map domains columns.timestamp"
    ):
        training_users(SPEC, film, timeless, None)
    with pytest.raises(InputError, match=r"task song->song: source and target are one domain; name two"):
        training_users(SPEC, song, timeless, None)


def test_a_direction_without_rows(tmp_path: Path) -> None:
    rows = WORLD.interactions
    films_last = rows.assign(position=rows["position"] + 100 * (rows["domain"] == "film"))
    with pytest.raises(
        InputError, match=r"no validation \(valid\) user's last item is of the target domain song; take"
    ):
        build_world(SequenceWorld(films_last), tmp_path)


def test_opening_what_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no task is built here; run `study extract` on the plan"):
        load_task(tmp_path)
    with pytest.raises(InputError, match=r"no task is built here; run `study extract` on the plan"):
        load_held_out(tmp_path)


# --- sequences ----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6), st.data())
def test_rows_of_sequences(rows: list[list[int]], data: st.DataObject) -> None:
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    item = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    whole = Sequences(item, torch.from_numpy(starts))
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    some = whole.rows(torch.tensor(chosen, dtype=torch.int64))
    assert lists(some) == [rows[i] for i in chosen]
    assert some.lengths.tolist() == [len(rows[i]) for i in chosen]
    assert some.row.tolist() == [place for place, i in enumerate(chosen) for _ in rows[i]]
    assert len(some) == len(chosen)


def test_rows_of_held_out_users(folders: dict[str, TaskFolders]) -> None:
    whole = load_held_out(folders["film-song"].test_dir)
    index = torch.tensor([3, 0])
    some = whole.rows(index)
    assert isinstance(some, HeldOut)
    assert some.target.equal(whole.target[index])
    assert some.candidates.equal(whole.candidates[index])
    assert lists(some.history) == [lists(whole.history)[3], lists(whole.history)[0]]


def test_at_the_same_time_a_seeded_hash_orders_items_and_not_their_numbers(tmp_path: Path) -> None:
    rows = pd.DataFrame(WORLD.interactions)
    tied = SequenceWorld(rows.assign(position=rows["position"] // 4))
    folder = build_world(tied, tmp_path)
    train = sequences_of(folder.task_dir)
    rising = steps = 0
    for user, items in train.items():
        own = rows[rows["user_id"] == user]
        place = pd.Series((own["position"] // 4).to_numpy(), own["item_id"])
        domain = dict(zip(own["item_id"], own["domain"], strict=True))
        key = {item: (place[item], tie_hash(user, item, domain[item], SPEC.data_seed)) for item in items}
        assert items == sorted(items, key=key.__getitem__)
        same = [(a, b) for a, b in pairwise(items) if place[a] == place[b]]
        rising, steps = rising + sum(a < b for a, b in same), steps + len(same)
    assert 0.4 < rising / steps < 0.6  # by their numbers, all would rise
    assert folder.counts["tied_interactions"] > len(rows) / 2
    other = build_world(tied, tmp_path / "other", replace(SPEC, data_seed=1))
    assert sequences_of(other.task_dir) != train


def test_items_that_come_again_are_learned_and_found(tmp_path: Path) -> None:
    """`duplicates: keep`: each user's last song is their first one, so that who expects it again finds every target."""
    rows = [
        (f"u{user:02d}", domain, f"{domain[0]}{(user + shift) % 30:03d}", position)
        for user in range(40)
        for position, (domain, shift) in enumerate([("song", 0), ("film", 0), ("song", 1), ("song", 0)])
    ]
    (data := tmp_path / "raw").mkdir()
    pd.DataFrame(rows, columns=["user_id", "domain", "item_id", "position"]).to_parquet(data / "all.parquet")
    film, song = (
        prepare_domain(
            DomainSpec(
                name=name, reader="table", interactions="all.parquet", columns={"timestamp": "position"},
                where={"domain": name}, feedback="implicit", duplicates="keep",
            ),
            data, tmp_path / "domains",
        )
        for name in ("film", "song")
    )  # fmt: skip
    spec = replace(SPEC, rank_seen="plain", protocols=("as-given",))
    folders = build_sequences(spec, film, song, None, None, None, tmp_path / "tasks")
    task, held_out = load_task(folders.task_dir), load_held_out(folders.test_dir)
    assert set(task.train.lengths.tolist()) == {4}
    first, last = task.train.item[task.train.starts[:-1]], task.train.item[task.train.starts[1:] - 1]
    assert first.equal(last)

    def predict(rows: HeldOut, task: SequenceTask, seed: int) -> torch.Tensor:
        scores = torch.zeros(len(rows), task.target[1] - task.target[0])
        return scores.scatter(1, rows.history.item[rows.history.starts[:-1], None] - task.target[0], 1.0)

    assert SEQUENCES.measure(held_out, predict, task, 0, full=True).metrics["full_hr5"] == 1.0
    ranked_last = replace(task, rank_seen="last")
    assert SEQUENCES.measure(held_out, predict, ranked_last, 0, full=True).metrics["full_hr5"] == 0.0
