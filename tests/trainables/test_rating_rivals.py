"""What holds for each of MuSiC's rivals that predict ratings from ids; each model's formulas are tested in its own file."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.base_factors import base_vectors
from trainables.baselines.rating import PREDICTORS
from trainables.interface import Selection, load_model, make_config
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import Ratings, Task, load_task
from trainables.trial import run

from .training import train_seed
from .worlds import permuted, random_task

RIVALS = ("cmf", "diffcdr", "lacdr", "ptupcdr", "sscdr")
ABLATIONS = {
    "cmf": {"plain", "wo_source", "wo_target_users"},
    "diffcdr": {"plain", "wo_task", "wo_diffusion", "mlp", "noise_start"},
    "lacdr": {"plain", "wo_single", "wo_reconstruction", "full_rank"},
    "ptupcdr": {"plain", "shared", "mean_history", "mapping_loss"},
    "sscdr": {"plain", "wo_unlabelled", "wo_hops", "mlp"},
}
SOURCE = Path(__file__).parents[2]


def predicted(name: str, task: Task, **config: Any) -> Tensor:
    """Ratings of the validation users by the selected epoch, [N]."""
    settings = make_config(name, {"epochs": 3, "calibrate": False, **config}, "here")
    trained = train_seed(name, settings, task, 0)[-1]
    with torch.no_grad():
        return trained.predict(task.validation, task, 0)


@pytest.mark.parametrize("name", RIVALS)
def test_what_the_model_file_offers(name: str) -> None:
    model = load_model(name)
    assert (model.NAME.lower(), model.TASK_TYPE, model.NEEDS, model.NOTE) == (name, "ratings", (), "")
    assert Selection("val_rmse", "minimize") == model.SELECTION
    assert set(model.ABLATIONS) == ABLATIONS[name]
    for variant in model.ABLATIONS.values():
        assert make_config(name, variant.config, "here") != model.Config()
    assert model.ABLATIONS["plain"].config == {"rating_offset": "none", "calibrate": False}


@pytest.mark.parametrize("name", RIVALS)
def test_bad_numbers_are_refused_in_one_line(name: str) -> None:
    message = (
        r"^here: rating_offset is 'mean'; choose from none, item_mean, source_offset; .*dim is 0; give a whole number"
    )
    with pytest.raises(InputError, match=message):
        make_config(name, {"rating_offset": "mean", "dim": 0}, "here")


@pytest.mark.parametrize("name", RIVALS)
def test_each_offset_gives_other_predictions(name: str) -> None:
    task = random_task(seed=6)
    rated = [predicted(name, task, rating_offset=offset) for offset in ("none", "item_mean", "source_offset")]
    assert min(float((rated[one] - rated[two]).abs().mean()) for one, two in ((0, 1), (0, 2), (1, 2))) > 0.02


@pytest.mark.parametrize("name", RIVALS)
def test_an_item_without_training_ratings_is_predicted_by_the_offset_alone(name: str) -> None:
    task = random_task()
    cold = int(task.validation.ratings.item[0])

    def without(ratings: Ratings) -> Ratings:
        kept = ratings.item != cold
        return Ratings(ratings.user[kept], ratings.item[kept], ratings.rating[kept])

    task = replace(task, train=without(task.train), overlapping=without(task.overlapping))
    rows = task.validation.ratings.item == cold
    reference = PREDICTORS["source_offset"](task.validation, task)
    assert torch.equal(predicted(name, task)[rows], reference[rows])
    assert predicted(name, task, rating_offset="none")[rows].tolist() == [0.0] * int(rows.sum())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("cmf", {}),
        ("lacdr", {"batch": 100, "norm": "l2"}),
        ("ptupcdr", {"batch": 100, "history": 0}),
    ],
)
def test_numbering_users_anew_permutes_the_predictions(name: str, config: dict[str, Any]) -> None:
    task = random_task(seed=4, side=5)
    other, place = permuted(task, seed=1)
    for rating_offset in ("none", "item_mean"):
        settings = {**config, "rating_offset": rating_offset, "dim": 3}
        first, second = predicted(name, task, **settings), predicted(name, other, **settings)
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second[place], first, atol=1e-4, rtol=0)


def quick(name: str) -> dict[str, Any]:
    config = {"dim": 4, "epochs": 8, "lr": 1e-2, "batch": 32}
    return {field: value for field, value in config.items() if hasattr(load_model(name).Config(), field)}


@pytest.mark.parametrize("name", RIVALS)
def test_on_the_small_world_it_ends_near_the_reference_or_ahead_of_it(name: str, folders: TaskFolders) -> None:
    task = load_task(folders.task_dir)
    error_N = PREDICTORS["source_offset"](task.validation, task) - task.validation.ratings.rating
    *_, last = run(name, quick(name), str(folders.task_dir), (0, 1), str(folders.test_dir))
    assert last.metrics["val_rmse"] < float(error_N.square().mean().sqrt()) + 0.01
    assert 0 <= last.metrics["gain"] <= 1
    assert {"val_mae", "val_ndcg20", "train_loss", "variance_ratio", "test_rmse"} <= set(last.metrics)


@pytest.mark.parametrize("name", RIVALS)
def test_poor_tasks_are_trained_on_too(name: str) -> None:
    """No side users; nothing that anybody liked; one training user; a user who has rated every source-domain item."""
    bare = random_task(side=0)
    low = replace(bare.source_ratings, rating=torch.ones(len(bare.source_ratings)))
    tasks = [bare, replace(bare, source_ratings=low), random_task(overlapping=1), random_task(items=5, each=5)]
    for task in tasks:
        for rating_offset in ("none", "item_mean", "source_offset"):
            assert bool(predicted(name, task, rating_offset=rating_offset, epochs=1).isfinite().all())


ELSEWHERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[3]))
from tests.trainables.test_rating_rivals import outcomes
print(json.dumps(outcomes(sys.argv[2], [0, 1])))
"""


def outcomes(task_dir: str, seeds: list[int]) -> list[dict[str, str]]:
    """The last report of each rival, to the last bit."""
    base_vectors.cache_clear()
    finals = [list(run(name, {**quick(name), "epochs": 3}, task_dir, seeds))[-1] for name in RIVALS]
    return [{key: x.hex() for key, x in last.metrics.items() if "seconds" not in key} for last in finals]


@pytest.mark.parametrize("feature_set", ["ratings"], indirect=True)  # these models read no features
def test_the_same_seed_gives_the_same_bits_in_a_new_process_and_alone(folders: TaskFolders) -> None:
    arguments = [str(SOURCE), str(folders.task_dir), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = outcomes(str(folders.task_dir), [0, 1])
    assert both == json.loads(done.stdout)
    for together, alone in zip(both, outcomes(str(folders.task_dir), [1]), strict=True):
        for metric in ("val_rmse", "gain", "train_loss"):
            assert together[f"{metric}/seed_1"] == alone[metric]
        assert together["train_loss/seed_0"] != together["train_loss/seed_1"]


@pytest.mark.parametrize("feature_set", ["ratings"], indirect=True)
@pytest.mark.parametrize("name", RIVALS)
def test_after_a_kill_it_goes_on_to_the_last_bit(name: str, folders: TaskFolders) -> None:
    config = {**quick(name), "epochs": 4}
    states = []
    for report in run(name, config, str(folders.task_dir), [0, 1]):
        if report.state is not None and report.epoch == 2:
            torch.save(report.state(), file := io.BytesIO())
            file.seek(0)
            states.append(torch.load(file, weights_only=True))
    *_, again = run(name, config, str(folders.task_dir), [0, 1], state=states[0])
    assert {**again.metrics, "seconds": 0, "cpu_seconds": 0} == {**report.metrics, "seconds": 0, "cpu_seconds": 0}
