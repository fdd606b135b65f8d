"""From a plan of sequences to tasks: one table for both domains, given splits, other ratios, what trials share."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from features.domains.splits import read_split
from features.errors import InputError
from study.data.domains import data_folder, prepare_domains
from study.data.prepare import Inputs, describe_data, prepare
from study.data.preview import extraction_lines, preview
from study.data.pseudo_items import histories
from study.data.tables import estimates
from study.home import Home
from study.plan.load import load_plan
from study.plan.schema import Plan
from study.progress import Advance, no_progress
from study.specs import Cluster
from trainables.task_types import SEQUENCES
from trainables.tasks.sequential_build import training_users

from ..trainables.models_in_files import POPULAR, drop
from .tiny_sequences import PSEUDO, write_raw, write_sequences

SPACE = "v: {weight: {FloatDistribution: {low: 1.0, high: 4.0}}}"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "data")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plans of a model that counts items; what its trials share is made in this process, for no other knows the model."""
    drop("popular", POPULAR, tmp_path, monkeypatch)
    monkeypatch.setattr("study.engine.pool.ProcessPoolExecutor", lambda processes, **settings: ThreadPoolExecutor(1))

    def plan(**changes: Any) -> Plan:
        own = {"model": "popular", "base": {"epochs": 1}, "space_file": SPACE, "drop": ("ablate", "sweeps")}
        return load_plan(str(write_sequences(tmp_path, **{**own, **changes})))

    return plan


def stamps(home: Home) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.path.rglob("*") if path.is_file()}


def test_everything_is_made_once(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    home, steps = Home(tmp_path / "home"), []
    sweep = {"overlap_ratio": {"values": [0.5, 1.0], "seeds": [0, 3]}}
    plan = make(drop=("ablate",), sweeps=sweep)

    def start_progress(what: str, size: int) -> Callable[..., None]:
        return lambda done, *counts: steps.append((what, done))

    inputs = prepare(plan, raw, home, start_progress)
    tables = sorted(path.name.rpartition("-")[0] for path in (home.store / "features").iterdir())
    assert tables == ["film-items", "song-items"]
    assert list(inputs.tasks) == [
        (f"{task}@{ratio}", "text") for ratio in ("1", "0.5") for task in ("film->song", "song->film")
    ]
    # seeds 0 and 1 are the scores', 0 and 3 those of the sweep; both directions share what is made
    assert [done for what, done in steps if what == "pretraining Popular"] == list(range(1, 3 + 2 + 1))
    opened = [SEQUENCES.load_task(task.task_dir) for task in inputs.tasks.values()]
    assert opened[0].train_key == opened[1].train_key != opened[2].train_key
    shared = {(opened[0].train_key, seed) for seed in (0, 1, 3)} | {(opened[2].train_key, seed) for seed in (0, 3)}
    assert {path.name for path in (home.tasks / "shared").iterdir()} == {f"{key}-2.0-{seed}" for key, seed in shared}
    cells = inputs.cells(plan)
    assert [cell["train_overlapping"] for cell in cells] == [44, 44, 22, 22]
    assert list(inputs.pseudo) == ["film-song@1", "film-song@0.5"], "one for both directions"
    assert [cell["pseudo_items"] for cell in cells] == [4 * 20, 4 * 20, 4 * 64, 4 * 64]
    assert list(dict.fromkeys(what for what, _ in steps if "film-song@0.5" in what)) == [
        f"pseudo-items of film-song@0.5: {phase}" for phase in ("train", "generate", "encode")
    ]

    before = stamps(home)
    again = prepare(plan, raw, home, start_progress := mock.Mock(wraps=no_progress))
    assert stamps(home) == before
    assert not any("pretraining" in call.args[0] for call in start_progress.call_args_list)
    assert (again.data_key, again.feature_key, again.tasks) == (inputs.data_key, inputs.feature_key, inputs.tasks)


def test_every_row_is_pretrained_with_its_own_configuration(
    make: Callable[..., Plan], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, float, int, str]] = []

    def prepare_one(
        server: None, model: str, config: dict[str, Any], task_dir: Path, seeds: list[int], device: str
    ) -> None:
        calls.append((task_dir.parent.name[:9], config["weight"], seeds[0], device))

    monkeypatch.setattr("study.data.pretrain.prepare_one", prepare_one)
    bars: list[tuple[str, int]] = []

    def start_progress(what: str, size: int) -> Advance:
        bars.append((what, size))
        return no_progress(what, size)

    rival = {"model": "popular", "base": {"weight": 3.0}, "search": {"trials": 1}, "title": "Heavy"}
    plan = make(compare={"heavy": {**rival, "space": f"{tmp_path}/space.yaml/v"}}, resources={"gpus": 0.5})
    prepare(plan, raw, Home(tmp_path / "home"), start_progress)
    assert [bar for bar in bars if "pretraining" in bar[0]] == [("pretraining Popular, Heavy", 4)]
    assert calls == [("film-song", weight, seed, "cuda") for weight in (2.0, 3.0) for seed in (0, 1)]


def test_a_plan_whose_models_read_no_titles_needs_no_encoder(
    make: Callable[..., Plan], raw: Path, tmp_path: Path
) -> None:
    plan, home = make(features={}), Home(tmp_path / "home")
    inputs = prepare(plan, raw, home, no_progress)
    assert not home.store.exists()
    assert (dict(inputs.tables), dict(inputs.pseudo)) == ({}, {})
    assert {feature_set for _, feature_set in inputs.tasks} == {"ids"}
    assert {SEQUENCES.load_task(task.task_dir).text for task in inputs.tasks.values()} == {None}
    assert inputs.feature_key != prepare(make(features__pseudo=None), raw, home, no_progress).feature_key
    seen = preview(plan, inputs.domains, None, home)
    assert {name: (size.items, size.titles_left) for name, size in seen.domains.items()} == {
        "film": (48, 0), "song": (48, 0),
    }  # fmt: skip
    assert list(extraction_lines(plan, inputs.domains, home, Cluster())) == [
        "no texts to encode: the plan has no text features"
    ]


def test_held_out_users_are_the_given_ones(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    inputs = prepare(make(), raw, Home(tmp_path / "home"), no_progress)
    users = pd.read_parquet(raw / "users.parquet").set_index("user_id")["split"]
    for task in inputs.tasks.values():
        for folder, part in (
            (task.task_dir, "train"),
            (task.task_dir / "validation", "valid"),
            (task.test_dir, "test"),
        ):
            assert {users[str(user)] for user in pd.Series(_ids(folder))} == {part}


def _ids(folder: Path) -> list[str]:
    return [str(user).partition("@")[0] for user in np.load(folder / "user_id.npy")]


def test_keys_change_with_what_they_stand_for(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    def keys(**changes: Any) -> tuple[str, str]:
        inputs = prepare(make(**changes), raw, Home(tmp_path / "home"), no_progress)
        return inputs.data_key, inputs.feature_key

    data, features = keys()
    assert keys(search__trials=7) == (data, features)
    assert keys(overlap_ratios=[0.5]) == (data, features), "the cell's name says the ratio"
    assert keys(sequences__negatives=9)[0] == data
    assert keys(sequences__negatives=9)[1] != features
    moved = pd.read_parquet(raw / "users.parquet")
    moved.loc[0, "split"] = "train"
    moved.to_parquet(raw / "other.parquet")
    assert keys(sequences__users="other.parquet")[1] != features
    assert keys(sequences={"negatives": 19})[1] != features
    assert keys(features__pseudo={**PSEUDO, "texts": 3})[1] != features
    assert keys(features__pseudo=None)[1] != features
    assert keys(sweeps={"overlap_ratio": {"values": [0.5], "seeds": [0]}}, drop=("ablate",)) == (data, features)


def test_the_split_file_is_looked_for_with_the_others(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"reads interactions\.parquet, users\.parquet; say where they are with --data"
    ):
        data_folder(make(), None, Home(tmp_path), no_progress)
    assert data_folder(make(), raw.parent, Home(tmp_path), no_progress) == raw
    with pytest.raises(InputError, match=r"there is no column 'part' for split; its columns are user_id, split"):
        prepare(make(sequences__columns={"split": "part"}), raw, Home(tmp_path / "home"), no_progress)


def test_titles_of_both_domains_are_left_to_encode(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    plan = make()
    domains = prepare_domains(plan, raw, Home(tmp_path / "home"), no_progress)
    left = estimates(plan, domains, Home(tmp_path / "home"))
    assert {key: estimate.rows_left for key, estimate in left.items()} == {("film", "items"): 48, ("song", "items"): 48}


def test_what_is_logged_of_the_data(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    plan = make()
    inputs: Inputs = prepare(plan, raw, Home(tmp_path / "home"), no_progress)
    files = describe_data(plan, inputs, tmp_path / "logs")
    cells = json.loads(files["cells.json"].read_text())
    assert [(cell["source"], cell["target"], cell["ratio"]) for cell in cells] == [
        ("film", "song", 1),
        ("song", "film", 1),
    ]
    assert cells[0]["test_users"] + cells[1]["test_users"] == 8
    worth = json.loads(files["pseudo.json"].read_text())
    assert {(row["pair"], row["source"], row["target"]) for row in worth} == {
        ("film-song@1", "film", "song"), ("film-song@1", "song", "film"),
    }  # fmt: skip


def test_generators_read_training_users_alone(make: Callable[..., Plan], raw: Path, tmp_path: Path) -> None:
    plan = make()
    domains = prepare_domains(plan, raw, Home(tmp_path / "home"), no_progress)
    split = read_split(raw / "users.parquet", {})
    found = training_users(plan.sequences.at(1.0), domains["film"], domains["song"], split)
    users = {user.user: user.items for user in histories(found, ("film", "song"))}
    assert set(users) == {user for user, part in split.items() if part == "train"}
    rows = pd.read_parquet(raw / "interactions.parquet").sort_values("position")
    for user, items in users.items():
        for domain in ("film", "song"):
            own = rows[(rows["user_id"] == user) & (rows["domain"] == domain)]
            assert items[domain] == own["item_id"].tolist()
