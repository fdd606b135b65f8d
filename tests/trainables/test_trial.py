"""The runner: reports over seeds, early stopping, states, what trials share."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables import trial
from trainables.baselines.rating import PREDICTORS
from trainables.interface import load_model, model_names
from trainables.task_types import SEQUENCES, task_type_at
from trainables.tasks.arrays import FeatureRows, TaskFolders
from trainables.tasks.rating import load_held_out, load_task
from trainables.tasks.sequential import PROTOCOLS, seen
from trainables.trial import Report, has_shared, prepare, run, run_baseline, score, shared

from .models_in_files import CONSTANT, NOISY, POPULAR, drop
from .sequence_worlds import SPEC, make_sequence_task
from .training import quick, variants

CONFIG = {"epochs": 3, "feature_epochs": 2, "side_epochs": 2, "lr": 1e-2}

MODELS = [name for name in model_names() if "reviews" not in load_model(name).NEEDS]  # those have tests of their own


@pytest.fixture
def constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of ratings."""
    return drop("constant", CONSTANT, tmp_path, monkeypatch)


@pytest.fixture
def popular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of sequences."""
    return drop("popular", POPULAR, tmp_path, monkeypatch)


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of ratings that draws from torch's global generator, and from others."""
    return drop("noisy", NOISY, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Search and test folder of a sequence task."""
    return make_sequence_task(tmp_path_factory.mktemp("sequences"))


# --- reports ------------------------------------------------------------------------------------------------------


def test_reports_are_means_over_seeds_that_may_end_at_different_epochs(constant: str, folders: TaskFolders) -> None:
    """Seed s predicts 4 + s/2 and trains s epochs longer; a seed that has ended keeps the values of its best epoch."""
    truth = load_task(folders.task_dir).validation.ratings.rating.double().numpy()
    mae = [float(np.abs(truth - 4 - seed / 2).mean()) for seed in (0, 1)]
    reports = list(run(constant, {}, str(folders.task_dir), [0, 1]))
    assert [(report.epoch, report.final) for report in reports] == [(1, False), (2, False), (3, False), (3, True)]
    for report in reports:
        assert report.metrics["val_mae"] == pytest.approx(np.mean(mae))
    losses = [report.metrics["train_loss"] for report in reports]
    assert losses == [1.5, 1.0, pytest.approx((1 / 2 + 4 / 3) / 2), pytest.approx((1 / 2 + 4 / 3) / 2)]
    final = reports[-1].metrics
    assert final["val_mae/seed_0"] == pytest.approx(mae[0])
    assert final["val_mae_std"] == pytest.approx(np.std(mae, ddof=1))
    assert (final["selected_epoch/seed_0"], final["selected_epoch/seed_1"]) == (1, 1), "the first of equals"
    assert final["seconds"] > 0
    assert reports[-1].artifacts == {}


def test_one_seed_has_no_spread(folders: TaskFolders) -> None:
    *_, final = run("music", CONFIG, str(folders.task_dir), [0])
    assert {value for name, value in final.metrics.items() if name.endswith("_std")} == {0.0}


def test_test_scores_come_with_a_row_per_seed_and_user(folders: TaskFolders) -> None:
    *_, final = run("music", CONFIG, str(folders.task_dir), [0, 3], str(folders.test_dir))
    rows = list(csv.DictReader(io.StringIO(str(final.artifacts["per_user.csv"]))))
    test = load_held_out(folders.test_dir)
    assert [(int(row["seed"]), int(row["user"])) for row in rows] == [
        (seed, user) for seed in (0, 3) for user in range(len(test.source))
    ]
    for seed in (0, 3):
        own = [row for row in rows if int(row["seed"]) == seed]
        total = sum(int(row["n"]) for row in own)
        assert total == len(test.ratings)
        mae = sum(float(row["sum_abs_error"]) for row in own) / total
        rmse = math.sqrt(sum(float(row["sum_squared_error"]) for row in own) / total)
        assert final.metrics[f"test_mae/seed_{seed}"] == pytest.approx(mae)
        assert final.metrics[f"test_rmse/seed_{seed}"] == pytest.approx(rmse)
        ndcg = np.mean([float(row["ndcg20"]) for row in own])
        assert final.metrics[f"test_ndcg20/seed_{seed}"] == pytest.approx(ndcg)


def test_validation_rows_are_what_the_selected_epoch_was_measured_by(folders: TaskFolders) -> None:
    *_, final = run("music", CONFIG, str(folders.task_dir), [0, 3], rows=True)
    rows = list(csv.DictReader(io.StringIO(str(final.artifacts["val_per_user.csv"]))))
    users = len(load_task(folders.task_dir).validation.source)
    assert [(int(row["seed"]), int(row["user"])) for row in rows] == [(s, u) for s in (0, 3) for u in range(users)]
    for seed in (0, 3):
        own = [row for row in rows if int(row["seed"]) == seed]
        squared, n = (sum(float(row[name]) for row in own) for name in ("sum_squared_error", "n"))
        assert final.metrics[f"val_rmse/seed_{seed}"] == pytest.approx(math.sqrt(squared / n))
    *_, without = run("music", CONFIG, str(folders.task_dir), [0, 3])
    assert without.artifacts == {}
    (report,) = run_baseline("baseline", {"baseline": "item_mean"}, str(folders.task_dir), [-1], rows=True)
    assert str(report.artifacts["val_per_user.csv"]).splitlines()[1].startswith("-1,0,")


def test_dual_cold_start_scores_are_over_the_items_without_training_ratings(
    constant: str, folders: TaskFolders
) -> None:
    *_, final = run(constant, {"value": 4.0}, str(folders.task_dir), [0], str(folders.test_dir))
    cold = np.load(folders.test_dir / "cold_item.npy")
    assert final.metrics["test_cold_item_n"] == cold.sum()
    assert ("test_cold_item_rmse" in final.metrics) == bool(cold.any())


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_simple_baseline_reports_like_a_model(name: str, folders: TaskFolders) -> None:
    (report,) = run_baseline("baseline", {"baseline": name}, str(folders.task_dir), [-1], str(folders.test_dir))
    assert report.final
    assert {"val_mae", "val_rmse", "val_ndcg20", "test_mae", "test_rmse", "test_ndcg20"} <= set(report.metrics)
    assert str(report.artifacts["per_user.csv"]).splitlines()[1].startswith("-1,0,")


def test_a_missing_task_folder_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no task is built here; run `study extract` on the plan$"):
        next(run("music", CONFIG, str(tmp_path / "nowhere"), [0]))


# --- sequences ----------------------------------------------------------------------------------------------------


def test_a_model_of_sequences_goes_through_the_same_runner(popular: str, sequences: tuple[Path, Path]) -> None:
    folder, test = map(str, sequences)
    first, final = run(popular, {}, folder, [0, 1], test)
    names = [f"{prefix}{name}{at}" for prefix in ("", "full_") for name in ("hr", "ndcg") for at in (5, 10)]
    for name in names:
        by = [final.metrics[f"test_{name}_{protocol}"] for protocol in PROTOCOLS]
        assert final.metrics[f"test_{name}"] == pytest.approx(np.mean(by))
        per_seed = [final.metrics[f"test_{name}/seed_{seed}"] for seed in (0, 1)]
        assert final.metrics[f"test_{name}"] == pytest.approx(np.mean(per_seed))
    assert {name for name in {**first.metrics, **final.metrics} if name.startswith("val_full")} == set()
    assert final.metrics["val_ndcg10"] == first.metrics["val_ndcg10"]
    assert final.metrics["val_seconds"] > 0
    rows = list(csv.DictReader(io.StringIO(str(final.artifacts["per_user.csv"]))))
    task, held_out = SEQUENCES.load_task(sequences[0]), SEQUENCES.load_held_out(sequences[1])
    users = int(held_out.user.max()) + 1
    assert [(row["seed"], row["protocol"], int(row["user"])) for row in rows] == [
        (seed, protocol, user) for seed in "01" for protocol in task.protocols for user in range(users)
    ]
    for metric in (*SEQUENCES.metrics, *SEQUENCES.full):
        mean = np.mean([float(row[metric.total]) for row in rows if row["protocol"] == "inter"])
        assert final.metrics[f"test_{metric.name}_inter"] == pytest.approx(mean)


@pytest.mark.parametrize("name", SEQUENCES.baselines)
def test_a_simple_baseline_of_sequences_reports_like_a_model(name: str, sequences: tuple[Path, Path]) -> None:
    (report,) = run_baseline("baseline", {"baseline": name}, str(sequences[0]), [-1], str(sequences[1]))
    assert {f"{part}_ndcg10_{protocol}" for part in ("val", "test") for protocol in PROTOCOLS} <= set(report.metrics)
    task, test = SEQUENCES.load_task(sequences[0]), SEQUENCES.load_held_out(sequences[1])
    assert report.metrics["test_hr5"] == score(SEQUENCES.as_predict(name), test, task, 0)[1]["test_hr5"]


def test_a_task_is_not_given_to_a_model_of_another_type(
    constant: str, popular: str, sequences: tuple[Path, Path], folders: TaskFolders
) -> None:
    with pytest.raises(InputError, match="its task is of type sequences, which model constant does not take"):
        next(run(constant, {}, str(sequences[0]), [0]))
    with pytest.raises(InputError, match="its task is of type ratings, which model popular does not take"):
        next(run(popular, {}, str(folders.task_dir), [0]))


def test_what_trials_share_is_made_ahead_of_them(popular: str, constant: str, tmp_path: Path) -> None:
    folder, _ = make_sequence_task(tmp_path / "world")
    prepare(popular, {"weight": 3.0}, str(folder), [0, 7])
    folders = shared(popular, {"weight": 3.0}, str(folder), [0, 7])
    assert len(folders) == 2
    assert all((folder.parents[1] / made).is_dir() for made in folders)
    assert (has_shared(popular), has_shared(constant)) == (True, False)
    assert shared(constant, {}, str(folder), [0]) == []
    with pytest.raises(InputError, match=r"config of popular: unknown field 'weigth'; did you mean 'weight'\?"):
        prepare(popular, {"weigth": 3.0}, str(folder), [0])


# --- going on from a state ----------------------------------------------------------------------------------------


def results(reports: list[Report]) -> list[dict[str, float]]:
    return [{name: value for name, value in report.metrics.items() if "seconds" not in name} for report in reports]


def tensors(part: Any) -> list[torch.Tensor]:
    """Copies of all tensors of a task."""
    if isinstance(part, torch.Tensor):
        return [part.clone()]
    if isinstance(part, FeatureRows):
        return [part[torch.arange(len(part))].clone(), part.centre.clone()]
    return [one for field in fields(part) for one in tensors(getattr(part, field.name))] if is_dataclass(part) else []


def assert_goes_on(
    model: str, config: dict[str, object], task_dir: str, test_dir: str, folder: Path, stages: int, ends: bool = False
) -> None:
    """From the file of every place that gives a state, to the last bit; `stages` of them come before the first epoch.

    `ends`: the model ends by itself, so that its last epoch is reported before the final report.
    """
    task = task_type_at(Path(task_dir)).load_task(Path(task_dir))
    states, whole = [], []
    for report in run(model, config, task_dir, [0, 1], test_dir, rows=True):
        whole.append(report)
        if report.state is not None:
            states.append(folder / f"{len(whole)}.pt")
            torch.save(report.state(), states[-1])
    assert len(states) == len(whole) - 1 >= stages + 2
    epochs = list(range(1, len(whole) - stages + 1))
    assert [report.epoch for report in whole] == [0] * stages + (epochs[:-1] + epochs[-2:-1] if ends else epochs)
    expected = results(whole)
    assert expected[:stages] == [{}] * stages
    for number, path in enumerate(states, start=1):
        torch.manual_seed(99)  # another process
        state = torch.load(path, weights_only=True)
        rest = list(run(model, config, task_dir, [0, 1], test_dir, rows=True, state=state))
        assert results(rest) == expected[number:]
        assert rest[-1].artifacts == whole[-1].artifacts
        for spent in ("seconds", "cpu_seconds"):
            assert rest[-1].metrics[spent] > state[spent] > 0, "time before the stop counts"
    # Trials of a process share the open task: none leaves a trace in it.
    shared, fresh = tensors(trial.open_task(task_dir)), tensors(task)
    assert len(shared) == len(fresh) > 10
    assert all(map(torch.equal, shared, fresh))


def test_music_goes_on_in_every_stage_to_the_last_bit(folders: TaskFolders, tmp_path: Path) -> None:
    """Two epochs of the feature and of the side stage, then epochs where one seed has ended and the other has not."""
    config = {**CONFIG, "epochs": 5, "patience": 1, "dropout": 0.4}
    assert_goes_on("music", config, str(folders.task_dir), str(folders.test_dir), tmp_path, stages=4)


@pytest.mark.parametrize("changes", [{"x0": "joint", "user_mlps": "two"}, {"x0": "detached"}, {"diffusion": False}])
def test_musics_paper_preset_goes_on_to_the_last_bit(
    changes: dict[str, object], folders: TaskFolders, tmp_path: Path
) -> None:
    """Two epochs of the side stage, where there is diffusion, then epochs of which only the last one is measured."""
    config = {**CONFIG, **load_model("music").PRESETS["paper"], "epochs": 3, "dropout": 0.4, **changes}
    stages = 0 if "diffusion" in changes else 2
    assert_goes_on("music", config, str(folders.task_dir), str(folders.test_dir), tmp_path, stages=stages)


def test_the_last_epoch_is_kept_where_nothing_is_selected(folders: TaskFolders) -> None:
    """It is the sixth of a training that measures every epoch, and no other one is measured."""
    config = {**CONFIG, "epochs": 6, "patience": 1, "keep": "last", "calibrate": False}
    *epochs, last = (report for report in run("music", config, str(folders.task_dir), [0]) if report.metrics)
    assert [set(report.metrics) for report in epochs] == [{"train_loss"}] * 5
    assert (last.epoch, last.metrics["selected_epoch"]) == (6, 6.0)
    measured = {**config, "epochs": 7, "patience": 9, "keep": "best"}
    whole = [report.metrics for report in run("music", measured, str(folders.task_dir), [0]) if report.metrics]
    assert [report.metrics["train_loss"] for report in epochs] == [metrics["train_loss"] for metrics in whole[:5]]
    for name in ("val_rmse", "val_ndcg20", "train_loss", "variance_ratio"):
        assert last.metrics[name] == whole[5][name]
    assert min(metrics["val_rmse"] for metrics in whole) < last.metrics["val_rmse"], "else this would show nothing"


def test_lgcd_goes_on_to_the_last_bit(sequences: tuple[Path, Path], tmp_path: Path) -> None:
    config = {"epochs": 3, "encoder_epochs": 1, "batch": 16, "negatives": 10, "steps": 8, "dropout": 0.4}
    assert_goes_on("lgcd", config, *map(str, sequences), tmp_path, stages=0)


def test_a_model_without_states_gives_none(constant: str, folders: TaskFolders) -> None:
    assert {report.state for report in run(constant, {"value": 3.5}, str(folders.task_dir), [0])} == {None}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_on_to_the_last_bit(
    name: str, folders: TaskFolders, sequences: tuple[Path, Path], tmp_path: Path, feature_set: str
) -> None:
    """In one of its variants at least; a model that is solved in closed form has no state."""
    task_dir, test_dir = type_folders(name, folders, sequences, feature_set)
    for changes in variants(name):
        config = quick(name, epochs=3, **changes)
        first = next(run(name, config, str(task_dir), [0]))
        if first.state is not None:
            stages = sum(not report.metrics for report in run(name, config, str(task_dir), [0]))
            return assert_goes_on(name, config, str(task_dir), str(test_dir), tmp_path, stages=stages)
    raise AssertionError("no variant of it has a state")


def type_folders(
    name: str, folders: TaskFolders, sequences: tuple[Path, Path], feature_set: str = "ratings"
) -> tuple[Path, Path]:
    """Search and test folder of the model's task type; tasks of sequences are the same whatever the feature set."""
    if feature_set == "text" and load_model(name).TASK_TYPE == "sequences":
        pytest.skip("trained once, beside the other feature set")
    return (folders.task_dir, folders.test_dir) if load_model(name).TASK_TYPE == "ratings" else sequences


def test_every_kind_of_part_goes_on_to_the_last_bit(noisy: str, folders: TaskFolders, tmp_path: Path) -> None:
    assert_goes_on(noisy, {}, str(folders.task_dir), str(folders.test_dir), tmp_path, stages=1)


def test_a_model_that_ends_by_itself_goes_on_behind_its_last_epoch(
    noisy: str, folders: TaskFolders, tmp_path: Path
) -> None:
    config: dict[str, object] = {"ends": 3, "patience": 9}
    assert_goes_on(noisy, config, str(folders.task_dir), str(folders.test_dir), tmp_path, stages=1, ends=True)


# --- one seed and others ------------------------------------------------------------------------------------------


def seed_results(model: str, config: dict[str, object], folders: tuple[Path, Path], seeds: list[int]) -> dict[str, Any]:
    """Each seed's numbers, and its rows of both artifacts."""
    *_, last = run(model, config, str(folders[0]), seeds, str(folders[1]), rows=True)
    found: dict[str, Any] = {}
    for seed in seeds:
        found[f"{seed}"] = {
            name.removesuffix(f"/seed_{seed}"): value
            for name, value in last.metrics.items()
            if name.endswith(f"/seed_{seed}") and "seconds" not in name
        }
        for name, text in last.artifacts.items():
            rows = csv.DictReader(io.StringIO(str(text)))
            found[f"{seed} {name}"] = [row for row in rows if row["seed"] == str(seed)]
    return found


def assert_seeds_are_independent(model: str, config: dict[str, object], folders: tuple[Path, Path]) -> None:
    """Seed 0 alone, first of three and last of three; drawing from the global generator beforehand changes nothing."""
    alone = seed_results(model, config, folders, [0])
    torch.manual_seed(123)
    grown, turned = (seed_results(model, config, folders, seeds) for seeds in ([0, 1, 2], [2, 1, 0]))
    assert grown == turned
    assert {name: grown[name] for name in alone} == alone
    assert len(alone) == 3
    assert len({grown[seed]["train_loss"] for seed in "012"}) == 3


def test_a_seed_of_music_gives_the_same_alone_and_beside_others(folders: TaskFolders) -> None:
    config = {**CONFIG, "epochs": 4, "patience": 1, "dropout": 0.4}
    assert_seeds_are_independent("music", config, (folders.task_dir, folders.test_dir))


@pytest.mark.parametrize("guidance", ["cross_attention", "cfg"])
def test_a_seed_of_lgcd_gives_the_same_alone_and_beside_others(guidance: str, sequences: tuple[Path, Path]) -> None:
    config = {"epochs": 3, "encoder_epochs": 1, "batch": 16, "negatives": 10, "steps": 8, "dropout": 0.4}
    assert_seeds_are_independent("lgcd", {**config, "guidance": guidance}, sequences)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_of_every_model_gives_the_same_alone_and_beside_others(
    name: str, folders: TaskFolders, sequences: tuple[Path, Path], feature_set: str
) -> None:
    assert_seeds_are_independent(name, quick(name), type_folders(name, folders, sequences, feature_set))


def test_a_seed_has_the_global_generator_to_itself(noisy: str, folders: TaskFolders) -> None:
    assert_seeds_are_independent(noisy, {}, (folders.task_dir, folders.test_dir))


def test_what_is_drawn_between_two_reports_changes_nothing_and_is_not_changed(noisy: str, folders: TaskFolders) -> None:
    expected = results(list(run(noisy, {}, str(folders.task_dir), [0, 1])))
    torch.manual_seed(5)
    drawn = torch.rand(len(expected)).tolist()
    torch.manual_seed(5)
    reports, between = [], []
    for report in run(noisy, {}, str(folders.task_dir), [0, 1]):
        reports.append(report)
        between.append(float(torch.rand(())))
    assert results(reports) == expected
    assert between == drawn


# --- the best epoch and the end -----------------------------------------------------------------------------------

STEPS = """
from dataclasses import dataclass
import torch
from torch import nn
from trainables.interface import Epoch, Selection, Setup

NAME, TASK_TYPE, SELECTION = "Steps", "ratings", Selection("val_mae", "minimize")

@dataclass(frozen=True, kw_only=True)
class Config:
    path: str = "3 2 1 2 3 4"  # predictions by epoch
    epochs: int = 6
    patience: int = 6
    setup: bool = True

def train(config, task, seed):
    network = nn.Linear(1, 1)
    copies = []
    if config.setup:
        yield Setup(network)
    for value in map(float, config.path.split()):
        network.bias.data.fill_(value)
        kept = network.bias.detach() if config.setup else network.bias.detach().clone()
        yield Epoch(
            predict=lambda held_out, task, seed, kept=kept: kept.expand(len(held_out.ratings)),
            metrics={"train_loss": value, "own": 10 * value},
        )
"""


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose predictions follow a path."""
    return drop("steps", STEPS, tmp_path, monkeypatch)


def worst_to_best(folders: TaskFolders) -> tuple[float, float, float]:
    """Three constants, each nearer to the validation ratings than the one before."""
    truth = load_task(folders.task_dir).validation.ratings.rating
    return tuple(sorted((1.0, 3.0, 4.0), key=lambda value: -float((truth - value).abs().mean())))  # type: ignore[return-value]


@pytest.mark.parametrize("setup", [True, False])
def test_the_best_epoch_is_scored_and_the_last_loss_is_reported(steps: str, setup: bool, folders: TaskFolders) -> None:
    bad, good, best = worst_to_best(folders)
    config = {"path": f"{bad} {best} {good} {bad}", "epochs": 4, "setup": setup}
    *running, final = run(steps, config, str(folders.task_dir), [0], str(folders.test_dir))
    assert [report.epoch for report in running] == [1, 2, 3]
    assert final.metrics["selected_epoch"] == 2
    assert final.metrics["own"] == 10 * best
    assert final.metrics["train_loss"] == bad
    assert final.metrics["val_mae"] == running[1].metrics["val_mae"]
    truth = load_held_out(folders.test_dir).ratings.rating.double()
    assert final.metrics["test_mae"] == pytest.approx(float((truth - best).abs().mean()))


@pytest.mark.parametrize(("patience", "epochs", "last"), [(1, 9, 3), (2, 9, 4), (9, 5, 5), (9, 1, 1)])
def test_epochs_and_patience_end_the_training(
    steps: str, patience: int, epochs: int, last: int, folders: TaskFolders
) -> None:
    bad, good, best = worst_to_best(folders)
    path = " ".join(map(str, (good, best, good, bad, bad, bad, bad, bad, bad, bad)))
    reports = list(run(steps, {"path": path, "epochs": epochs, "patience": patience}, str(folders.task_dir), [0]))
    assert [report.epoch for report in reports] == list(range(1, last + 1))
    assert reports[-1].metrics["selected_epoch"] == min(2, last)


def test_equal_epochs_are_not_better(steps: str, folders: TaskFolders) -> None:
    *_, final = run(steps, {"path": "3 3 3 3", "patience": 2}, str(folders.task_dir), [0])
    assert (final.epoch, final.metrics["selected_epoch"]) == (3, 1)


def test_a_metric_that_is_no_number_ends_the_training(steps: str, folders: TaskFolders) -> None:
    reports = run(steps, {"path": "3 nan 3"}, str(folders.task_dir), [0])
    next(reports)
    with pytest.raises(FloatingPointError, match=r"^val_mae is nan in epoch 2; lower lr$"):
        next(reports)


def test_a_training_without_an_epoch_is_refused(steps: str, folders: TaskFolders) -> None:
    with pytest.raises(RuntimeError, match=r"^model steps: train ends without an Epoch; yield one after each epoch$"):
        next(run(steps, {"path": ""}, str(folders.task_dir), [0]))


def test_a_second_setup_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: TaskFolders) -> None:
    twice = STEPS.replace("yield Setup(network)", "yield Setup(network)\n        yield Setup(network)")
    name = drop("twice", twice, tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"^model twice: train yields a second Setup; yield one, before all else$"):
        next(run(name, {}, str(folders.task_dir), [0]))


def test_a_task_that_does_not_measure_the_selection_metric_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, protocols=("inter",))
    folder, _ = make_sequence_task(tmp_path / "world", spec=spec)
    text = POPULAR.replace("val_ndcg10", "val_ndcg10_as-given")
    name = drop("given", text, tmp_path, monkeypatch)
    with pytest.raises(
        InputError, match=r"its validation gives no val_ndcg10_as-given, which selects the epochs of given"
    ):
        next(run(name, {}, str(folder), [0]))


# --- scores of sequences ------------------------------------------------------------------------------------------


def test_rows_are_scored_in_chunks_of_bounded_size(
    sequence_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk but the first has a seed of its own, and metrics are those of all rows at once."""
    task, held_out = SEQUENCES.load_task(sequence_folders[0]), SEQUENCES.load_held_out(sequence_folders[1])
    wide, calls = task.target[1] - task.target[0], []

    def predict(chunk: Any, task: Any, seed: int) -> torch.Tensor:
        calls.append((len(chunk), seed))
        return torch.sin(chunk.user[:, None] * 7 + chunk.protocol[:, None] + torch.arange(wide))

    whole = SEQUENCES.measure(held_out, predict, task, 5, full=True)
    assert calls == [(len(held_out), 5)]
    calls.clear()
    monkeypatch.setattr("trainables.task_types.SCORE_BYTES", 4 * wide * 6 + 3)
    chunked = SEQUENCES.measure(held_out, predict, task, 5, full=True)
    assert [size for size, _ in calls] == [6] * (len(held_out) // 6) + [len(held_out) % 6] * (len(held_out) % 6 > 0)
    seeds = [seed for _, seed in calls]
    assert seeds[0] == 5
    assert len(set(seeds)) == len(seeds) > 2
    assert {name: value for name, value in chunked.metrics.items() if "seconds" not in name} == {
        name: value for name, value in whole.metrics.items() if "seconds" not in name
    }
    assert all(np.array_equal(chunked.columns[name], whole.columns[name]) for name in whole.columns)
    given = SEQUENCES.measure(held_out, predict, task, 5, full=True, predicted=predict(held_out, task, 5))
    assert {**given.metrics, "seconds": 0, "cpu_seconds": 0} == {**whole.metrics, "seconds": 0, "cpu_seconds": 0}


def test_food_kitchen_is_one_chunk() -> None:
    """1,274 rows of 27,637 items: the noise of its predictions is drawn once."""
    from trainables.task_types import SCORE_BYTES

    assert 4 * 1_274 * 27_637 <= SCORE_BYTES < 4 * 2 * 1_274 * 27_637


def test_items_of_the_history_come_last(sequence_folders: tuple[Path, Path]) -> None:
    """Among the candidates and among all items: a scorer that likes nothing but the history finds no target."""
    task, held_out = SEQUENCES.load_task(sequence_folders[0]), SEQUENCES.load_held_out(sequence_folders[1])
    hidden = seen(held_out.history, task.target)
    target = held_out.target - task.target[0]

    def predict(rows: Any, task: Any, seed: int) -> torch.Tensor:
        scores = hidden.float()
        return scores.scatter(1, target[:, None], 0.5)

    assert hidden.any()
    measured = SEQUENCES.measure(held_out, predict, task, 0, full=True)
    assert measured.metrics["hr5"] == measured.metrics["full_hr5"] == 1.0
    # With `rank_seen: plain` each item of the history is ahead of the target, of whatever row: a model's or a baseline's.
    plain = SEQUENCES.measure(held_out, predict, replace(task, rank_seen="plain"), 0, full=True)
    ahead = hidden.sum(dim=1)
    for protocol in task.protocols:
        rows = held_out.protocol == task.protocols.index(protocol)
        found = float((ahead[rows] < 5).float().mean())
        assert plain.metrics[f"full_hr5_{protocol}"] == pytest.approx(found, abs=1e-6)
    assert plain.metrics["full_hr5_inter"] == 1.0  # which shows none of them
    assert plain.metrics["full_hr5_as-given"] < 1.0
