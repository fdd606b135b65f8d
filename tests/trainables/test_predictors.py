"""The simple predictors against a loop over the raw table."""

from __future__ import annotations

import numpy as np

from trainables.baselines.rating import PREDICTORS, as_predict
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import load_held_out, load_task
from trainables.trial import score


def test_predictors_against_a_loop(folders: TaskFolders) -> None:
    task, test = load_task(folders.task_dir), load_held_out(folders.test_dir)
    ratings = test.ratings
    expected: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    for user, item in zip(ratings.user.tolist(), ratings.item.tolist(), strict=True):
        rated = task.train.rating[task.train.item == item].tolist()
        item_mean = task.mean + sum(value - task.mean for value in rated) / (len(rated) + 5)
        expected["global_mean"].append(task.mean)
        expected["item_mean"].append(item_mean)
        expected["source_offset"].append(item_mean + task.slope * float(test.source_offset[user]))
    for name, values in expected.items():
        predicted = as_predict(name)(test, task, 0)
        np.testing.assert_allclose(predicted, np.clip(values, 1, 5), atol=1e-5)


def test_each_predictor_knows_more_than_the_one_before(folders: TaskFolders) -> None:
    task, test = load_task(folders.task_dir), load_held_out(folders.test_dir)
    rmse = [score(as_predict(name), test, task, 0)[1]["test_rmse"] for name in PREDICTORS]
    assert list(PREDICTORS) == ["global_mean", "item_mean", "source_offset"]
    assert rmse[1] < rmse[0] + 0.01
    assert rmse[2] < rmse[1] - 0.03


def test_predictions_stay_within_the_scale(folders: TaskFolders) -> None:
    task, test = load_task(folders.task_dir), load_held_out(folders.test_dir)
    predicted = as_predict("source_offset")(test, task, 0)
    assert float(predicted.min()) >= 1
    assert float(predicted.max()) <= 5
