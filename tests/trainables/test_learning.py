"""On a world whose taste transfers, MuSiC learns it, and what it generates does not collapse."""

from __future__ import annotations

import math

import pytest

from trainables.baselines.rating import as_predict
from trainables.tasks.arrays import TaskFolders
from trainables.tasks.rating import load_held_out, load_task
from trainables.trial import run, score

from .worlds import build, make_world

CONFIG = {
    "epochs": 15, "patience": 15, "feature_epochs": 10, "side_epochs": 10, "lr": 3e-3, "batch_users": 32,
    "rating_offset": "source_offset", "activation": "tanh", "schedule": "linear_scaled", "steps": 10,
}  # fmt: skip
VARIANCE = (0.2, 1.5)  # of the generated vectors, as a share of the real target vectors'


@pytest.fixture(scope="module")
def learnable(feature_set: str, tmp_path_factory: pytest.TempPathFactory) -> TaskFolders:
    """420 users a domain, 320 in both; users, items and taste all matter."""
    world = make_world(seed=3, users=420, overlap=320, items=80, each=20)
    return build(world, tmp_path_factory.mktemp(f"learnable-{feature_set}"), feature_set)


def trained(folders: TaskFolders, **changes: object) -> dict[str, float]:
    *running, final = run("music", CONFIG | changes, str(folders.task_dir), [0], str(folders.test_dir))
    last = running[-1].metrics  # the selected epoch may be an early one; a collapse would show at the end
    return final.metrics | {"last_variance_ratio": last["variance_ratio"]}


def baseline_rmse(name: str, folders: TaskFolders) -> float:
    test, task = load_held_out(folders.test_dir), load_task(folders.task_dir)
    return score(as_predict(name), test, task, 0)[1]["test_rmse"]


def test_music_learns_what_transfers_and_keeps_its_variance(learnable: TaskFolders) -> None:
    metrics = trained(learnable)
    assert metrics["test_rmse"] < baseline_rmse("global_mean", learnable) - 0.2
    assert metrics["test_rmse"] < baseline_rmse("source_offset", learnable) - 0.05
    for name in ("variance_ratio", "last_variance_ratio"):
        assert VARIANCE[0] < metrics[name] < VARIANCE[1]


def test_without_any_offset_it_still_learns_more_than_item_means(learnable: TaskFolders) -> None:
    metrics = trained(learnable, rating_offset="global_mean")
    assert metrics["test_rmse"] < baseline_rmse("item_mean", learnable) - 0.1


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_other_activations_learn_and_do_not_collapse(activation: str, learnable: TaskFolders) -> None:
    metrics = trained(learnable, activation=activation)
    # Softmax vectors differ by little (Figure 4 finds them worst); they must not end behind the offset all the same.
    assert metrics["test_rmse"] < baseline_rmse("source_offset", learnable) + 0.005
    assert 0.1 < metrics["last_variance_ratio"] < 3


@pytest.mark.parametrize("ablation", ["diffusion", "side"])
def test_ablated_models_learn_too(ablation: str, learnable: TaskFolders) -> None:
    metrics = trained(learnable, **{ablation: False})
    assert metrics["test_rmse"] < baseline_rmse("source_offset", learnable) - 0.05
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_model_that_has_learned_nothing_is_not_behind_the_last_simple_predictor(learnable: TaskFolders) -> None:
    """A tiny learning rate: what is left is the offset, and a residual of untrained networks."""
    metrics = trained(learnable, lr=1e-5, epochs=2, feature_epochs=0, side_epochs=0)
    assert metrics["test_rmse"] < baseline_rmse("source_offset", learnable) + 0.01
