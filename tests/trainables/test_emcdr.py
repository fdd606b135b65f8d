"""EMCDR: known answers of the mapping, a slow reference, and what it may not depend on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import InputError
from trainables.base_factors import BaseVectors, base_vectors
from trainables.baselines.rating import PREDICTORS
from trainables.calibration import cross_fitted_gain
from trainables.interface import Epoch, Selection, Setup, load_model, make_config
from trainables.mapped_users import perceptron, squared_distance
from trainables.models.emcdr import (
    ABLATIONS,
    EMCDR,
    MAPPINGS,
    Config,
    linear_map,
    most_active,
    train,
    train_epoch,
)
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import Ratings, Task, load_task
from trainables.trial import run

from .slow_base import slow_base
from .worlds import normal, permuted, planted_task, random_task, uneven

PLAIN = {"rating_offset": "none", "calibrate": False}


def trained(task: Task, seed: int = 0, **config: Any) -> Epoch:
    """The last epoch of a training without the runner."""
    settings = Config(**config)
    places = train(settings, task, seed)
    epochs = settings.epochs if settings.mapping == "mlp" else 1
    last = [place for place, _ in zip(places, range(epochs + 1), strict=False)][-1]
    assert isinstance(last, Epoch)
    return last


def predicted(task: Task, **config: Any) -> Tensor:
    """Ratings of the validation users by the model of the last epoch, [N]."""
    with torch.no_grad():
        return trained(task, **config).predict(task.validation, task, 0)


# --- known answers ------------------------------------------------------------------------------------------------


def test_the_linear_map_of_one_number() -> None:
    source, target = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
    assert linear_map(source, target, 0.0).weight.item() == pytest.approx(2.0)  # 10 / 5
    assert linear_map(source, target, 5.0).weight.item() == pytest.approx(1.0)  # 10 / (5 + 5)


def test_a_planted_linear_map_is_found() -> None:
    source, planted = normal(0, 12, 5), normal(1, 5, 5)
    torch.testing.assert_close(linear_map(source, source @ planted, 1e-12).weight.T, planted, atol=1e-8, rtol=0)


def test_planted_ratings_of_users_without_target_ratings_are_recovered() -> None:
    task = planted_task()
    settings = {**PLAIN, "dim": 2, "ridge": 1e-6, "map_ridge": 1e-9}
    error = predicted(task, **settings) - task.validation.ratings.rating
    assert float(error.square().mean().sqrt()) < 1e-3
    copied = predicted(task, **settings, mapping="copy") - task.validation.ratings.rating
    assert float(copied.square().mean().sqrt()) > 0.1


def test_a_map_under_an_infinite_penalty_leaves_the_offset() -> None:
    task = random_task()
    rated = predicted(task, map_ridge=1e12, calibrate=False)
    torch.testing.assert_close(rated, PREDICTORS["source_offset"](task.validation, task), atol=1e-6, rtol=0)
    assert float(predicted(task, **PLAIN, map_ridge=1e12).abs().max()) < 1e-6


def fitted(source_UD: Tensor, target_UD: Tensor) -> Callable[[Tensor], Tensor]:
    """A perceptron after 150 epochs."""
    generator = torch.Generator().manual_seed(0)
    mapping = perceptron(source_UD.shape[1], 4 * source_UD.shape[1], generator)
    adam = torch.optim.Adam(mapping.parameters(), lr=3e-3)
    losses = [
        train_epoch(mapping, adam, source_UD, target_UD, torch.ones(len(source_UD)).double(), generator)
        for _ in range(150)
    ]
    assert losses[-1] < 0.2 * losses[0]
    return mapping


def test_the_perceptron_learns_what_a_linear_map_cannot_and_a_linear_map_as_well() -> None:
    source, planted = normal(0, 300, 4), normal(1, 4, 4)
    train_rows, test_rows = slice(0, 200), slice(200, 300)

    def errors(target: Tensor) -> tuple[float, float]:
        linear = linear_map(source[train_rows], target[train_rows], 0.01)
        mapping = fitted(source[train_rows], target[train_rows])
        with torch.no_grad():
            found = [squared_distance(f(source[test_rows]), target[test_rows]) for f in (linear, mapping)]
        return float(found[0]), float(found[1])

    linear, perceptron_error = errors(torch.tanh(source @ planted))
    assert perceptron_error < 0.5 * linear
    straight = source @ planted
    noise = float(straight.square().sum(dim=1).mean()) / 100
    linear, perceptron_error = errors(straight)
    assert linear < 1e-6
    assert perceptron_error < 5 * noise


def test_turning_the_source_vectors_changes_no_prediction() -> None:
    """The penalty weighs all directions alike, and nothing else sees the axes."""
    task = random_task(seed=2)
    base = base_vectors(task, 4, 5.0, "source_offset", 0)
    turn = torch.linalg.qr(normal(5, 4, 4)).Q
    teachers = torch.arange(len(task.source))

    def rated(base: BaseVectors) -> Tensor:
        mapping = linear_map(base.source_users[teachers], base.target_users[teachers], 0.7)
        return EMCDR(Config(), base, mapping).predict(task.validation, task, 0)

    turned = replace(base, source_users=base.source_users @ turn)
    assert not torch.allclose(turned.source_users, base.source_users)
    torch.testing.assert_close(rated(turned), rated(base), atol=1e-6, rtol=0)


# --- a slow reference, one rating at a time -----------------------------------------------------------------------


def slow_predictions(task: Task, config: Config, seed: int) -> list[float]:
    """Predictions of the validation ratings before the gain, from the text, float64."""
    source, _, target, items = slow_base(task, config.dim, config.ridge, config.rating_offset, seed)
    active = sorted(range(len(task.source)), key=lambda user: -int((task.overlapping.user == user).sum()))
    gram, right = config.map_ridge * np.eye(source.shape[1]), np.zeros((source.shape[1], source.shape[1]))
    for user in active[: round(config.active_share * len(active))]:
        gram, right = gram + np.outer(source[user], source[user]), right + np.outer(source[user], target[user])
    mapping = np.linalg.inv(gram) @ right
    held_out, ratings = task.validation, task.validation.ratings
    offset = base_vectors(task, config.dim, config.ridge, config.rating_offset, seed).offset(held_out).tolist()
    return [
        known + float(source[held_out.source_row[user]] @ mapping @ items[item])
        for user, item, known in zip(ratings.user.tolist(), ratings.item.tolist(), offset, strict=True)
    ]


@pytest.mark.parametrize("rating_offset", ["none", "item_mean", "source_offset"])
def test_predictions_against_the_slow_reference(rating_offset: str) -> None:
    task = uneven(random_task(seed=7))
    settings: dict[str, Any] = {
        "dim": 3, "ridge": 2.0, "map_ridge": 0.3, "active_share": 0.5, "rating_offset": rating_offset,
    }  # fmt: skip
    slow = torch.tensor(slow_predictions(task, Config(**settings), 0))
    torch.testing.assert_close(predicted(task, **settings, calibrate=False), slow, atol=1e-6, rtol=1e-6)
    offset = base_vectors(task, 3, 2.0, rating_offset, 0).offset(task.validation)
    ratings, epoch = task.validation.ratings, trained(task, **settings)
    gain_N, gain = cross_fitted_gain(slow - offset, ratings.rating - offset, ratings.user)
    assert epoch.metrics["gain"] == pytest.approx(gain, abs=1e-6)
    torch.testing.assert_close(epoch.validation, offset + gain_N * (slow - offset), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(predicted(task, **settings), offset + gain * (slow - offset), atol=1e-6, rtol=1e-6)


def test_the_perceptron_against_a_loop_and_its_start_after_glorot() -> None:
    mapping, z = perceptron(6, 12, torch.Generator().manual_seed(3)), normal(0, 1, 6)
    inner, inner_bias, outer, outer_bias = (parameter.detach().numpy() for parameter in mapping.parameters())
    limit = np.sqrt(6 / (6 + 12))
    assert 0.8 * limit < np.abs(inner).max() <= limit
    assert not inner_bias.any()
    assert not outer_bias.any()
    inner_bias += normal(1, 12).numpy()
    hidden = [np.tanh(sum(float(z[0, k]) * inner[h, k] for k in range(6)) + inner_bias[h]) for h in range(12)]
    expected = [sum(hidden[h] * outer[k, h] for h in range(12)) for k in range(6)]
    np.testing.assert_allclose(mapping(z)[0].detach(), expected, atol=1e-12)


def test_an_epoch_of_the_perceptron_against_gradients_by_hand() -> None:
    """Batches of 16 users in the generator's order; the loss is averaged over the users of a batch."""
    source, target = normal(0, 20, 2), normal(1, 20, 2)
    mapping, again = (perceptron(2, 2, torch.Generator().manual_seed(3)) for _ in range(2))
    step = torch.optim.SGD(mapping.parameters(), lr=0.1)
    loss = train_epoch(mapping, step, source, target, torch.ones(20).double(), torch.Generator().manual_seed(4))
    order, total = torch.randperm(20, generator=torch.Generator().manual_seed(4)), 0.0
    weights = [parameter.detach().numpy() for parameter in again.parameters()]
    for rows in (order[:16].tolist(), order[16:].tolist()):
        gradients = [np.zeros_like(weight) for weight in weights]
        for z, wanted in ((source[row].numpy(), target[row].numpy()) for row in rows):
            hidden = np.tanh(weights[0] @ z + weights[1])
            error = weights[2] @ hidden + weights[3] - wanted
            total += float(error @ error)
            back = (weights[2].T @ (2 * error)) * (1 - hidden**2)
            for gradient, own in zip(
                gradients, (np.outer(back, z), back, np.outer(2 * error, hidden), 2 * error), strict=True
            ):
                gradient += own / len(rows)
        weights = [weight - 0.1 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    assert loss == pytest.approx(total / 20, abs=1e-12)
    for parameter, weight in zip(mapping.parameters(), weights, strict=True):
        np.testing.assert_allclose(parameter.detach(), weight, atol=1e-12)


# --- what it depends on, and what not -----------------------------------------------------------------------------


def test_the_most_active_users_teach_and_of_equals_the_first() -> None:
    task = random_task(overlapping=4, side=0)
    user = torch.tensor([0, 1, 1, 2, 2, 3, 3, 3])
    task = replace(task, overlapping=Ratings(user, torch.arange(8), torch.ones(8)))
    assert most_active(task, 1.0).tolist() == [0, 1, 2, 3]
    assert most_active(task, 0.5).tolist() == [1, 3]
    assert most_active(task, 0.01).tolist() == [3]


@pytest.mark.parametrize("mapping", ["linear", "copy"])
@pytest.mark.parametrize("rating_offset", ["none", "item_mean", "source_offset"])
def test_numbering_users_anew_permutes_the_predictions(mapping: str, rating_offset: str) -> None:
    task = random_task(seed=4, side=5)
    other, place = permuted(task, seed=1)
    settings = {"mapping": mapping, "rating_offset": rating_offset, "calibrate": False, "dim": 3}
    first, second = predicted(task, **settings), predicted(other, **settings)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second[place], first, atol=1e-5, rtol=0)


def test_each_offset_gives_other_predictions() -> None:
    task = random_task(seed=6)
    rated = [predicted(task, rating_offset=name, calibrate=False) for name in ("none", "item_mean", "source_offset")]
    distance = [float((rated[one] - rated[two]).abs().mean()) for one, two in ((0, 1), (0, 2), (1, 2))]
    assert min(distance) > 0.02
    assert min(distance[:2]) > 1  # without an offset, a few small factors have to reach ratings of mean 3


def test_vectors_that_are_of_no_use_are_not_believed() -> None:
    """They point the wrong way: the gain is 0 and what is left is the reference baseline, to the last bit."""
    task = planted_task()
    base = base_vectors(task, 2, 1.0, "source_offset", 0)
    teachers = torch.arange(len(task.source))
    mapping = linear_map(base.source_users[teachers], -base.target_users[teachers], 0.01)
    epoch = EMCDR(Config(), base, mapping).epoch(task, 0.0)
    reference = PREDICTORS["source_offset"](task.validation, task)
    assert epoch.metrics["gain"] == 0
    assert epoch.validation is not None
    assert torch.equal(epoch.validation, reference)
    assert torch.equal(epoch.predict(task.validation, task, 0), reference)
    useful = trained(task, dim=2, ridge=1.0)
    assert useful.metrics["gain"] > 0.5


def test_an_item_without_training_ratings_is_predicted_by_the_offset_alone() -> None:
    task = random_task()
    cold = int(task.validation.ratings.item[0])

    def without(ratings: Ratings) -> Ratings:
        kept = ratings.item != cold
        return Ratings(ratings.user[kept], ratings.item[kept], ratings.rating[kept])

    task = replace(task, train=without(task.train), overlapping=without(task.overlapping))
    rows = task.validation.ratings.item == cold
    reference = PREDICTORS["source_offset"](task.validation, task)
    assert torch.equal(predicted(task, calibrate=False)[rows], reference[rows])
    assert predicted(task, **PLAIN)[rows].tolist() == [0.0] * int(rows.sum())


# --- the contract -------------------------------------------------------------------------------------------------


def test_what_the_model_file_offers() -> None:
    model = load_model("emcdr")
    assert (model.NAME, model.TASK_TYPE, model.NEEDS, model.NOTE) == ("EMCDR", "ratings", (), "")
    assert Selection("val_rmse", "minimize") == model.SELECTION
    assert set(model.ABLATIONS) == {"plain", "mlp", "active_half", "copy"}
    for variant in ABLATIONS.values():
        assert make_config("emcdr", variant.config, "here") != Config()


def test_the_closed_forms_are_one_epoch_and_the_perceptron_as_many_as_are_asked_for() -> None:
    task = random_task()
    for mapping in ("linear", "copy"):
        assert [type(place) for place in train(Config(mapping=mapping), task, 0)] == [Epoch]
    places = train(Config(mapping="mlp"), task, 0)
    assert [type(next(places)) for _ in range(4)] == [Setup, Epoch, Epoch, Epoch]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mapping": "tree"}, r"^mapping is 'tree'; choose from linear, mlp, copy$"),
        ({"rating_offset": "mean"}, r"^rating_offset is 'mean'; choose from none, item_mean, source_offset$"),
        ({"active_share": 0.0}, r"^active_share is 0\.0; give a number above 0"),
        ({"active_share": 1.5}, r"^active_share is 1\.5; give a number above 0, up to 1$"),
        ({"map_ridge": 0.0, "dim": 0}, r"^map_ridge is 0\.0; give a number above 0; dim is 0; give a whole number"),
        ({"lr": float("inf")}, r"^lr is inf; give a finite number above 0$"),
    ],
)
def test_a_number_out_of_range_is_refused(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**values)


def outcome(folders: TaskFolders, config: Mapping[str, Any], seeds: tuple[int, ...] = (0,)) -> dict[str, float]:
    *_, last = run("emcdr", config, str(folders.task_dir), seeds, str(folders.test_dir))
    return {name: value for name, value in last.metrics.items() if "seconds" not in name}


def test_weighing_users_by_their_ratings_is_visiting_each_rating() -> None:
    """As public code does: a row per target rating."""
    task = uneven(random_task(seed=7))
    base = base_vectors(task, 3, 2.0, "none", 0)
    row = task.overlapping.user
    share = len(row) / len(task.source)  # rows for each user, by which the penalty counts less
    mapping = linear_map(base.source_users[row], base.target_users[row], 0.3 * share)
    rated = EMCDR(Config(calibrate=False), base, mapping).predict(task.validation, task, 0)
    weighed = predicted(task, **PLAIN, dim=3, ridge=2.0, map_ridge=0.3, user_weight="ratings")
    torch.testing.assert_close(weighed, rated, atol=1e-6, rtol=0)
    assert not torch.allclose(weighed, predicted(task, **PLAIN, dim=3, ridge=2.0, map_ridge=0.3), atol=1e-4)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_it_trains_on_the_small_world_and_ends_near_the_reference_or_ahead_of_it(
    folders: TaskFolders, mapping: str
) -> None:
    task = load_task(folders.task_dir)
    reference = float(
        (PREDICTORS["source_offset"](task.validation, task) - task.validation.ratings.rating).square().mean().sqrt()
    )
    metrics = outcome(folders, {"mapping": mapping, "dim": 4, "epochs": 15, "lr": 1e-2})
    assert metrics["val_rmse"] < reference + 0.01
    assert 0 <= metrics["gain"] <= 1
    assert metrics["selected_epoch"] == 1 or mapping == "mlp"
    assert {"val_mae", "val_ndcg20", "train_loss", "variance_ratio", "test_rmse"} <= set(metrics)


def test_on_a_world_whose_taste_transfers_the_mapping_is_worth_something(folders: TaskFolders) -> None:
    linear, copied, plain = (
        outcome(folders, {"dim": 2, "ridge": 3.0, **change})["val_rmse"]
        for change in ({}, {"mapping": "copy"}, {**PLAIN, "ridge": 1.0})
    )
    assert linear < copied - 0.02
    assert plain > linear + 0.02


ELSEWHERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[3]))
from trainables.trial import run
said = []
for config in json.loads(sys.argv[4]):
    *_, last = run("emcdr", config, sys.argv[2], [0, 1])
    said.append({name: value.hex() for name, value in last.metrics.items() if "seconds" not in name})
print(json.dumps(said))
"""


@pytest.mark.parametrize("feature_set", ["ratings"], indirect=True)  # the model reads no features
def test_the_same_seed_gives_the_same_bits_here_and_in_a_new_process(folders: TaskFolders) -> None:
    configs: list[dict[str, Any]] = [{"dim": 3}, {"dim": 3, "mapping": "mlp", "epochs": 4}, {**PLAIN, "dim": 3}]

    def here() -> list[dict[str, str]]:
        base_vectors.cache_clear()
        finals = [list(run("emcdr", config, str(folders.task_dir), [0, 1]))[-1] for config in configs]
        return [{name: x.hex() for name, x in last.metrics.items() if "seconds" not in name} for last in finals]

    arguments = [
        str(Path(__file__).parents[2]),
        str(folders.task_dir),
        str(torch.get_num_threads()),
        json.dumps(configs),
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = here()
    assert first == here() == json.loads(done.stdout)
    assert first[1]["train_loss/seed_0"] != first[1]["train_loss/seed_1"]


def test_seeds_together_give_what_each_gives_alone(folders: TaskFolders) -> None:
    config = {"mapping": "mlp", "dim": 3, "epochs": 5}
    both = outcome(folders, config, (0, 1))
    for seed in (0, 1):
        alone = outcome(folders, config, (seed,))
        assert all(
            both[f"{name}/seed_{seed}"] == alone[name] for name in ("val_rmse", "test_rmse", "gain", "train_loss")
        )
