"""What every model that predicts the next item is held to, whatever its network: T1, T2, T5, T7, T8 of the specification.

T1 nothing but the history shown is read; T2 a row's scores depend on no other row; T5 what a protocol hides changes
nothing; T7 a kept model gives the same scores; T8 better than popularity where taste can be learned. Slow references of
each network (T3) and learning by heart (T4) stand in the files of the models; that a kill costs nothing (T6) in
test_trial.py, for every model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainables.interface import field_types, load_model, make_config, model_names
from trainables.task_types import SEQUENCES
from trainables.tasks.sequential import HeldOut, SequenceTask, load_held_out, load_task
from trainables.trial import kept_at, run

from .sequence_worlds import SequenceWorld, build_world, make_sequence_world
from .training import quick, train_seed

OWN_TESTS = ("lgcd", "sasrec", "gru4rec")
NAMES = [n for n in model_names() if load_model(n).TASK_TYPE == "sequences" and n not in OWN_TESTS]
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


@pytest.mark.parametrize("name", NAMES)
def test_t2_a_row_alone_and_beside_longer_ones_gives_the_same(task: SequenceTask, name: str) -> None:
    config = make_config(name, quick(name, epochs=1), "config")
    predict = train_seed(name, config, task, 0)[-1].predict
    whole = predict(task.validation, task, 0).detach()
    for row in range(0, len(task.validation), 5):
        alone = predict(task.validation.rows(torch.tensor([row])), task, 0).detach()
        torch.testing.assert_close(alone[0], whole[row], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_t5_what_a_protocol_hides_changes_no_score(tmp_path: Path, name: str) -> None:
    """The held-out users' earlier target-domain items are others; nothing else is."""
    world = make_sequence_world(items=32)
    task = load_task(build_world(world, tmp_path / "one").task_dir)
    held_out = [str(user) for user in np.load(task.folder / "validation" / "user_id.npy")]
    table, draw = world.interactions.copy(), np.random.default_rng(0)
    for user in held_out:
        rows = table.index[(table["user_id"] == user) & (table["domain"] == "song")]
        rows = rows[table.loc[rows, "position"] < table.loc[rows, "position"].max()]
        others = sorted(set(world.interactions.query("domain == 'song'")["item_id"]) - set(world.of(user)))
        table.loc[rows, "item_id"] = draw.choice(others, len(rows), replace=False)
    other = load_task(build_world(SequenceWorld(table), tmp_path / "other").task_dir)
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


@pytest.mark.parametrize("name", NAMES)
def test_t7_a_kept_model_gives_the_scores_of_the_trained_one(
    sequence_folders: tuple[Path, Path], task: SequenceTask, scored: HeldOut, name: str
) -> None:
    search, test = map(str, sequence_folders)
    config = quick(name, epochs=2)
    *_, final = run(name, config, search, [0], test)
    packed = torch.load(kept_at(name, config, search, [0]), weights_only=True)
    unpack = load_model(name).unpack
    assert unpack is not None
    score = unpack(make_config(name, packed["config"], "config"), packed["state"], packed["seed"])
    measured = SEQUENCES.measure(scored, lambda held_out, task, seed: score(held_out.history), task, 0, full=True)
    assert measured.metrics["ndcg10"] == final.metrics["test_ndcg10"]
    assert measured.metrics["full_hr10"] == final.metrics["test_full_hr10"]


@pytest.mark.parametrize("name", NAMES)
def test_t8_above_popularity_where_users_have_a_taste(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for constant, value in SHARED.get(name, {}).items():
        monkeypatch.setattr(f"trainables.models.{name}.{constant}", value)
    folders = build_world(make_sequence_world(users=240, overlap=160), tmp_path)
    learning = {"batch": 16, "negatives": 40, "epochs": 15, "lr": 3e-3, **LEARNING.get(name, {})}
    config = {field: value for field, value in learning.items() if field in field_types(load_model(name).Config)}
    *_, final = run(name, config, str(folders.task_dir), [0, 1], str(folders.test_dir))
    test, task = load_held_out(folders.test_dir), load_task(folders.task_dir)
    popular = SEQUENCES.measure(test, SEQUENCES.as_predict("popularity"), task, 0, full=False).metrics
    # The mean of two seeds: another processor rounds otherwise, and after 60 epochs that is another training.
    assert final.metrics["test_ndcg10_as-given"] > popular["ndcg10_as-given"] + 0.05
