"""Same seeds, same result: in another process, with another hash seed, in lockstep, interleaved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.tasks.arrays import TaskFolders
from trainables.trial import SeedTraining, Trial, run

from .training import Trained, train_seed
from .worlds import World, build

CONFIG = {"epochs": 4, "feature_epochs": 2, "side_epochs": 2, "lr": 1e-2}

BUILD_AND_TRAIN = """
import json, sys
from pathlib import Path
from typing import Any
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[3]))
from tests.trainables.test_determinism import said_of
from tests.trainables.worlds import build, make_world
world = make_world()
print(json.dumps({name: said_of(build(world, Path(sys.argv[2]) / name, name)) for name in ("ratings", "text")}))
"""


def said_of(folders: TaskFolders) -> list[str]:
    """The key of a task, and the reports of a training on it, as text."""
    reports = list(run("music", CONFIG, str(folders.task_dir), [0, 1], str(folders.test_dir)))
    for report in reports:
        for name in ("seconds", "cpu_seconds"):
            report.metrics.pop(name, None)
    return [folders.key, *(json.dumps([report.metrics, report.artifacts]) for report in reports)]


def final(task_dir: Path, seeds: list[int]) -> dict[str, float]:
    *_, last = run("music", CONFIG, str(task_dir), seeds)
    return {name: value for name, value in last.metrics.items() if "seconds" not in name}


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By feature_set, what a new process with another hash seed than this one's builds and trains."""
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    arguments = [
        str(Path(__file__).parents[2]),
        str(tmp_path_factory.mktemp("elsewhere")),
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BUILD_AND_TRAIN, *arguments], env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_a_process_with_another_hash_seed_builds_and_trains_the_same(
    feature_set: str, folders: TaskFolders, elsewhere: dict[str, list[str]]
) -> None:
    here = said_of(folders)
    assert len(here) >= 6
    assert here == elsewhere[feature_set]


def test_another_training_seed_gives_another_result_on_the_same_split(folders: TaskFolders) -> None:
    zero, one, again = (final(folders.task_dir, [seed]) for seed in (0, 1, 0))
    assert zero["val_rmse"] != one["val_rmse"]
    assert zero == again


def test_another_data_seed_gives_another_split(world: World, tmp_path: Path) -> None:
    from .worlds import SPLIT, SplitSpec

    first = build(world, tmp_path / "a", "ratings", SPLIT)
    second = build(world, tmp_path / "b", "ratings", SplitSpec(cold_ratio=0.3, validation_share=0.25, data_seed=1))
    assert final(first.task_dir, [0])["val_rmse"] != final(second.task_dir, [0])["val_rmse"]


def test_seeds_in_lockstep_give_what_each_gives_alone(folders: TaskFolders) -> None:
    both = final(folders.task_dir, [0, 1])
    for seed in (0, 1):
        alone = final(folders.task_dir, [seed])
        for name in ("val_rmse", "val_mae", "val_ndcg20", "train_loss", "variance_ratio", "selected_epoch"):
            assert both[f"{name}/seed_{seed}"] == alone[name], name


def said(trained: Sequence[Trained]) -> list[dict[str, float]]:
    return [dict(epoch.metrics) for epoch in trained]


def interleaved(first: SeedTraining, second: SeedTraining) -> list[dict[str, float]]:
    """Advance both by turns; the result of each."""
    while first.result is None or second.result is None:
        for training in (first, second):
            if training.result is None:
                training.advance()
    return [dict(first.result.metrics), dict(second.result.metrics)]


def test_two_trainings_interleaved_do_not_disturb_each_other(folders: TaskFolders) -> None:
    values: list[dict[str, Any]] = [{**CONFIG, "dropout": 0.4}, {**CONFIG, "steps": 3, "dropout": 0.2}]
    trials = [Trial.load("music", config, str(folders.task_dir), None, "cpu") for config in values]
    alone = [said(train_seed("music", trial.config, trial.task, 0))[-1] for trial in trials]
    assert interleaved(SeedTraining(trials[0], 0), SeedTraining(trials[1], 0)) == alone
    assert alone[0]["val_rmse"] != alone[1]["val_rmse"]
