"""The door: models found by their file, configurations with all their faults at once, reports over seeds."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from trainables import trial
from trainables.baselines.rating import PREDICTORS
from trainables.interface import load_model, make_config, model_names
from trainables.task_types import SEQUENCES, task_type_at
from trainables.tasks.arrays import FeatureRows, TaskFolders
from trainables.tasks.rating import load_held_out, load_task
from trainables.tasks.sequential import PROTOCOLS
from trainables.trial import Report, has_shared, prepare, run, run_predictor, score, shared

from .models_in_files import CONSTANT, POPULAR, drop
from .sequence_worlds import make_sequence_task

CONFIG = {"epochs": 3, "feature_epochs": 2, "side_epochs": 2, "lr": 1e-2}


@pytest.fixture
def constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of ratings."""
    return drop("constant", CONSTANT, tmp_path, monkeypatch)


@pytest.fixture
def popular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of sequences."""
    return drop("popular", POPULAR, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Search and test folder of a sequence task."""
    return make_sequence_task(tmp_path_factory.mktemp("sequences"))


# --- finding models -----------------------------------------------------------------------------------------------


def test_a_file_in_the_folder_is_a_model(constant: str, folders: TaskFolders) -> None:
    assert {"constant", "music"} <= set(model_names())
    assert load_model(constant).SELECTION == ("val_mae", "minimize")
    *_, final = run(constant, {"value": 3.5}, str(folders.task_dir), [0])
    truth = load_task(folders.task_dir).validation.ratings.rating.double()
    assert final.metrics["val_mae"] == pytest.approx(float((truth - 3.5).abs().mean()))


def test_only_files_are_models() -> None:
    assert "music" in model_names()
    with pytest.raises(InputError, match=r"^model: unknown 'musik'; choose from .*music"):
        load_model("musik")


# --- configurations -----------------------------------------------------------------------------------------------


def test_every_fault_of_a_configuration_is_told_at_once() -> None:
    values = {
        "epochz": 3, "lr": "1e-5", "steps": 2.5, "side": "yes", "diffusion": 1, "beta": 1.2, "dropout": 1.0,
        "activation": "gelu", "dim": 30, "batch_users": True, "hidden": 0,
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        make_config("music", values, "plan x, base")
    message = str(caught.value)
    assert message.startswith("plan x, base: unknown field 'epochz'; did you mean 'epochs'?; ")
    assert "\n" not in message
    for fault in (
        "lr is '1e-5'; give a value of type float (YAML reads this as text; write 1.0e-05)",
        "steps is 2.5; give a value of type int",
        "side is 'yes'; give a value of type bool",
        "diffusion is 1; give a value of type bool",
        "batch_users is True; give a value of type int",
        "beta is 1.2; give a number in [0, 1]",
        "dropout is 1.0; give a number in [0, 1)",
        "activation is 'gelu'; choose from tanh, relu, softmax",
        "dim is 30; give a multiple of 4",
        "hidden is 0; give a number of at least 1",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"steps": 1}, r"steps is 1; give a number of at least 2"),
        ({"epochs": 0}, r"epochs is 0; give a number of at least 1"),
        ({"lr": 0}, r"lr is 0; give a finite number above 0"),
        ({"lr": math.nan}, r"lr is nan; give a finite number"),
        ({"schedule": "cosine"}, r"schedule is 'cosine'; choose from linear, linear_scaled"),
        ({"rate_from": "x0"}, r"rate_from is 'x0'; choose from one_step, chain"),
        ({"rating_offset": "none"}, r"rating_offset is 'none'; choose from global_mean, item_mean, source_offset"),
        ({"variance_start": 0.5, "variance_end": 0.1}, r"give 0 < variance_start <= variance_end < 1"),
        ({"dropout": None}, r"dropout is None; give a value of type float"),
    ],
)
def test_a_field_out_of_range_is_refused(values: dict[str, object], fault: str) -> None:
    with pytest.raises(InputError, match=f"^here: .*{fault}"):
        make_config("music", values, "here")


def test_whole_numbers_are_numbers() -> None:
    assert make_config("music", {"beta": 1, "steps": 4}, "here").beta == 1


def test_ablations_fit_the_configuration() -> None:
    for variant in load_model("music").ABLATIONS.values():
        made = make_config("music", variant.config, "ablation")
        assert {name: getattr(made, name) for name in variant.config} == variant.config


# --- reports ------------------------------------------------------------------------------------------------------


def test_reports_are_means_over_seeds_that_may_end_at_different_epochs(constant: str, folders: TaskFolders) -> None:
    """Seed s predicts 4 + s/2 and trains s epochs longer; a seed that has ended keeps its last value."""
    truth = load_task(folders.task_dir).validation.ratings.rating.double().numpy()
    mae = [float(np.abs(truth - 4 - seed / 2).mean()) for seed in (0, 1)]
    reports = list(run(constant, {}, str(folders.task_dir), [0, 1]))
    assert [(report.epoch, report.final) for report in reports] == [(1, False), (2, False), (3, True)]
    for report in reports:
        assert report.metrics["val_mae"] == pytest.approx(np.mean(mae))
        assert report.metrics["train_loss"] == 0.5
    final = reports[-1].metrics
    assert final["val_mae/seed_0"] == pytest.approx(mae[0])
    assert final["val_mae_std"] == pytest.approx(np.std(mae, ddof=1))
    assert (final["selected_epoch/seed_0"], final["selected_epoch/seed_1"]) == (2, 3)
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
    (report,) = run_predictor("predictor", {"predictor": "item_mean"}, str(folders.task_dir), [-1], rows=True)
    assert str(report.artifacts["val_per_user.csv"]).splitlines()[1].startswith("-1,0,")


def test_dual_cold_start_scores_are_over_the_items_without_training_ratings(
    constant: str, folders: TaskFolders
) -> None:
    *_, final = run(constant, {"value": 4.0}, str(folders.task_dir), [0], str(folders.test_dir))
    cold = np.load(folders.test_dir / "cold_item.npy")
    assert final.metrics["test_cold_item_n"] == cold.sum()
    assert ("test_cold_item_rmse" in final.metrics) == bool(cold.any())


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_simple_predictor_reports_like_a_model(name: str, folders: TaskFolders) -> None:
    (report,) = run_predictor("predictor", {"predictor": name}, str(folders.task_dir), [-1], str(folders.test_dir))
    assert report.final
    assert {"val_mae", "val_rmse", "val_ndcg20", "test_mae", "test_rmse", "test_ndcg20"} <= set(report.metrics)
    assert str(report.artifacts["per_user.csv"]).splitlines()[1].startswith("-1,0,")


def test_a_missing_task_folder_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no task is built here; run `study extract` on the plan$"):
        next(run("music", CONFIG, str(tmp_path / "nowhere"), [0]))


# --- sequences ----------------------------------------------------------------------------------------------------


def test_a_model_of_sequences_goes_through_the_same_door(popular: str, sequences: tuple[Path, Path]) -> None:
    folder, test = map(str, sequences)
    first, final = run(popular, {}, folder, [0, 1], test)
    names = [f"{prefix}{name}{at}" for prefix in ("", "full_") for name in ("hr", "ndcg") for at in (5, 10)]
    for name in names:
        by = [final.metrics[f"test_{name}_{protocol}"] for protocol in PROTOCOLS]
        assert final.metrics[f"test_{name}"] == pytest.approx(np.mean(by))
        per_seed = [final.metrics[f"test_{name}/seed_{seed}"] for seed in (0, 1)]
        assert final.metrics[f"test_{name}"] == pytest.approx(np.mean(per_seed))
    assert {name for name in first.metrics if name.startswith("val_full")} == set()
    assert "val_full_ndcg10" in final.metrics, "the model asked for it in its last epoch"
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


@pytest.mark.parametrize("name", SEQUENCES.predictors)
def test_a_simple_predictor_of_sequences_reports_like_a_model(name: str, sequences: tuple[Path, Path]) -> None:
    (report,) = run_predictor("predictor", {"predictor": name}, str(sequences[0]), [-1], str(sequences[1]))
    assert {f"{part}_ndcg10_{protocol}" for part in ("val", "test") for protocol in PROTOCOLS} <= set(report.metrics)
    task, test = SEQUENCES.load_task(sequences[0]), SEQUENCES.load_held_out(sequences[1])
    assert report.metrics["test_hr5"] == score(SEQUENCES.as_predict(name), test, task, 0)[1]["test_hr5"]


def test_a_task_is_not_given_to_a_model_of_another_kind(
    constant: str, popular: str, sequences: tuple[Path, Path], folders: TaskFolders
) -> None:
    with pytest.raises(InputError, match="its task is of kind sequences, which model constant does not take"):
        next(run(constant, {}, str(sequences[0]), [0]))
    with pytest.raises(InputError, match="its task is of kind ratings, which model popular does not take"):
        next(run(popular, {}, str(folders.task_dir), [0]))


def test_what_trials_share_is_made_ahead_of_them(popular: str, constant: str, tmp_path: Path) -> None:
    folder, _ = make_sequence_task(tmp_path / "world")
    prepare(popular, {"weight": 3.0}, str(folder), [0, 7])
    assert [(folder / f"shared-{seed}.txt").read_text() for seed in (0, 7)] == ["3.0", "3.0"]
    assert (has_shared(popular), has_shared(constant)) == (True, False)
    assert shared(popular, {}, str(folder), [0, 7]) == [Path("shared/0"), Path("shared/7")]
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
    model: str, config: dict[str, object], task_dir: str, test_dir: str, folder: Path, stages: int
) -> None:
    """From the file of every place that gives a state, to the last bit; `stages` of them come before the first epoch."""
    task = task_type_at(Path(task_dir)).load_task(Path(task_dir))
    states, whole = [], []
    for report in run(model, config, task_dir, [0, 1], test_dir, rows=True):
        whole.append(report)
        if report.state is not None:
            states.append(folder / f"{len(whole)}.pt")
            torch.save(report.state(), states[-1])
    assert len(states) == len(whole) - 1 >= stages + 2
    assert [report.epoch for report in whole] == [0] * stages + list(range(1, len(whole) - stages + 1))
    expected = results(whole)
    assert expected[:stages] == [{}] * stages
    for number, path in enumerate(states, start=1):
        torch.manual_seed(99)  # another process
        state = torch.load(path, weights_only=True)
        rest = list(run(model, config, task_dir, [0, 1], test_dir, rows=True, state=state))
        assert results(rest) == expected[number:]
        assert rest[-1].artifacts == whole[-1].artifacts
        assert rest[-1].metrics["seconds"] > state["seconds"], "time before the stop counts"
    # Trials of a process share the open task: none leaves a trace in it.
    shared, fresh = tensors(trial._task(task_dir)), tensors(task)
    assert len(shared) == len(fresh) > 10
    assert all(map(torch.equal, shared, fresh))


def test_music_goes_on_in_every_stage_to_the_last_bit(folders: TaskFolders, tmp_path: Path) -> None:
    """Two epochs of the feature and of the side stage, then epochs where one seed has ended and the other has not."""
    config = {**CONFIG, "epochs": 5, "patience": 1, "dropout": 0.4}
    assert_goes_on("music", config, str(folders.task_dir), str(folders.test_dir), tmp_path, stages=4)


def test_lgcd_goes_on_to_the_last_bit(sequences: tuple[Path, Path], tmp_path: Path) -> None:
    config = {"epochs": 3, "encoder_epochs": 1, "batch": 16, "negatives": 10, "steps": 8, "dropout": 0.4}
    assert_goes_on("lgcd", config, *map(str, sequences), tmp_path, stages=0)


def test_a_model_without_states_gives_none(constant: str, folders: TaskFolders) -> None:
    assert {report.state for report in run(constant, {"value": 3.5}, str(folders.task_dir), [0])} == {None}
