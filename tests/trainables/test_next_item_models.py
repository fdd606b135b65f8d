"""What every model that predicts the next item is held to, whatever its network: T1, T2, T5, T7, T8 of the specification.

T1 nothing but the history shown is read; T2 a row's scores depend on no other row; T5 what a protocol hides changes
nothing; T7 a kept model gives the same scores; T8 better than popularity where taste can be learned. Slow references of
each network (T3) stand in the files of the models, learning by heart (T4) in test_by_heart.py; that a kill costs nothing
(T6) in test_trial.py, for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.interface import field_types, load_model, make_config, model_names
from trainables.task_types import SEQUENCES
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.sequential import HeldOut, Sequences, SequenceTask, load_held_out, load_task
from trainables.trial import kept_at, run

from .sequence_worlds import SequenceWorld, build_world, make_sequence_world
from .training import quick, train_seed

NAMES = [n for n in model_names() if load_model(n).TASK_TYPE == "sequences" and n != "lgcd"]
LEARNING: dict[str, dict[str, Any]] = {  # what a model needs beside the defaults to learn 240 users' taste in seconds
    "diffurec": {
        "blocks": 1,
        "steps": 8,
        "sampler_steps": 1,
        "lr": 1e-2,
        "epochs": 60,
        "patience": 60,
        "dropout_embed": 0.0,
    },
    "mgcl": {"epochs": 40, "patience": 40, "alpha": 0.0, "beta": 0.0, "gamma": 0.0},
    "fearec": {"dropout": 0.1, "contrast": 0.0, "frequency_weight": 0.0},
    "unisrec": {"batch": 32},
    "ctt": {"lr": 1e-3, "epochs": 30, "patience": 8},
    "da_dan": {
        "epochs": 60,
        "patience": 60,
        "dropout": 0.0,
        "bridge": False,
        "adversarial": 0.0,
        "difference": 0.0,
        "reconstruction": 0.0,
    },
    "cd_cdr": {"batch": 64, "steps": 10, "epochs": 40, "patience": 40},
    "unicdr": {"batch": 64, "epochs": 40, "patience": 40},
}

SHARED = {"sscdr_sequences": {"SPACE_BATCH": 64, "SPACE_LR": 1e-2}}  # the same of what its trials share


@dataclass(frozen=True)
class Kept:
    """A trial's last report, and the model that it has kept."""

    metrics: Mapping[str, float]
    score: Callable[[Sequences], Tensor]


@pytest.fixture(scope="module")
def kept(sequence_folders: tuple[Path, Path], request: pytest.FixtureRequest) -> Kept:
    """One training of a model for all that is asked of it here."""
    search, test = map(str, sequence_folders)
    name, config = request.param, quick(request.param, epochs=2)
    *_, final = run(name, config, search, [0], test)
    packed = torch.load(kept_at(name, config, search, [0]), weights_only=True)
    unpack = load_model(name).unpack
    assert unpack is not None
    score = unpack(make_config(name, packed["config"], "config"), packed["state"], packed["seed"])
    return Kept(final.metrics, score)


@pytest.mark.parametrize("name", NAMES)
def test_an_ablation_changes_something(name: str) -> None:
    default = make_config(name, {}, "config")
    for variant in load_model(name).ABLATIONS.values():
        assert make_config(name, variant.config, "config") != default


@torch.no_grad()
@pytest.mark.parametrize("kept", NAMES, indirect=True)
def test_t2_a_row_alone_and_beside_longer_ones_gives_the_same(task: SequenceTask, kept: Kept) -> None:
    history = task.validation.history
    whole = kept.score(history)
    for row in range(0, len(history), 5):
        alone = kept.score(history.rows(torch.tensor([row])))
        torch.testing.assert_close(alone[0], whole[row], atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[SequenceTask, SequenceTask]:
    """A task, and another in which the held-out users' earlier target-domain items are others; nothing else is."""
    folder, world = tmp_path_factory.mktemp("two"), make_sequence_world(items=32)
    task = load_task(build_world(world, folder / "one").task_dir)
    held_out = [str(user) for user in np.load(task.folder / "validation" / "user_id.npy")]
    table, draw = world.interactions.copy(), np.random.default_rng(0)
    for user in held_out:
        rows = table.index[(table["user_id"] == user) & (table["domain"] == "song")]
        rows = rows[table.loc[rows, "position"] < table.loc[rows, "position"].max()]
        others = sorted(set(world.interactions.query("domain == 'song'")["item_id"]) - set(world.of(user)))
        table.loc[rows, "item_id"] = draw.choice(others, len(rows), replace=False)
    return task, load_task(build_world(SequenceWorld(table), folder / "other").task_dir)


@pytest.mark.parametrize("name", NAMES)
def test_t5_what_a_protocol_hides_changes_no_score(two_tasks: tuple[SequenceTask, SequenceTask], name: str) -> None:
    task, other = two_tasks
    config = make_config(name, quick(name, epochs=1), "config")
    inter = task.validation.protocol == task.protocols.index("inter")
    hidden, shown = ([], [])  # scores of either world, of rows that hide those items and of rows that show them
    for given in (task, other):
        predict = train_seed(name, config, given, 0)[-1].predict
        for scores, which in ((hidden, inter), (shown, ~inter)):  # apart: the length of a batch is its longest row's
            scores.append(predict(given.validation.rows(which.nonzero()[:, 0]), given, 0).detach())
    assert hidden[0].equal(hidden[1])
    changed = [not one.equal(two) for one, two in zip(*shown, strict=True)]
    assert sum(changed) > 0.5 * len(changed)


@pytest.mark.parametrize("kept", NAMES, indirect=True)
def test_t7_a_kept_model_gives_the_scores_of_the_trained_one(task: SequenceTask, scored: HeldOut, kept: Kept) -> None:
    def predict(held_out: HeldOut, task: SequenceTask, seed: int) -> Tensor:
        return kept.score(held_out.history)

    measured = SEQUENCES.measure(scored, predict, task, 0, full=True)
    assert measured.metrics["ndcg10"] == kept.metrics["test_ndcg10"]
    assert measured.metrics["full_hr10"] == kept.metrics["test_full_hr10"]


@pytest.fixture(scope="module")
def tasteful(tmp_path_factory: pytest.TempPathFactory) -> TaskFolders:
    """240 users, who stay with one genre most of the time."""
    return build_world(make_sequence_world(users=240, overlap=160), tmp_path_factory.mktemp("tasteful"))


@pytest.mark.parametrize("name", NAMES)
def test_t8_above_popularity_where_users_have_a_taste(
    tasteful: TaskFolders, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for constant, value in SHARED.get(name, {}).items():
        monkeypatch.setattr(f"trainables.models.{name}.{constant}", value)
    learning = {"batch": 16, "negatives": 40, "epochs": 15, "lr": 3e-3, **LEARNING.get(name, {})}
    config = {field: value for field, value in learning.items() if field in field_types(load_model(name).Config)}
    *_, final = run(name, config, str(tasteful.task_dir), [0, 1], str(tasteful.test_dir))
    test, task = load_held_out(tasteful.test_dir), load_task(tasteful.task_dir)
    popular = SEQUENCES.measure(test, SEQUENCES.as_predict("popularity"), task, 0, full=False).metrics
    # The mean of two seeds: another processor rounds otherwise, and after 60 epochs that is another training.
    assert final.metrics["test_ndcg10_as-given"] > popular["ndcg10_as-given"] + 0.05
