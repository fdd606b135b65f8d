"""What is read back from MLflow equals what was logged, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from features.errors import InputError
from study.tracking.results import Results, load_results

from ..store import CONFIG, MUSIC, Store, empty_store, seeds_around, with_seeds

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_every_trial_once_with_its_tags_params_and_metrics(results: Results) -> None:
    counts = results.trials.groupby(["part", "status"]).size().to_dict()
    assert counts == {
        ("ablate", "FINISHED"): 12,
        ("score", "FINISHED"): 16,
        ("search", "FAILED"): 1,
        ("search", "FINISHED"): 48,
        ("search", "RUNNING"): 1,
        ("sweep:activation", "FINISHED"): 12,
        ("sweep:steps", "FINISHED"): 20,
    }
    row = results.finished("sweep:steps").set_index(["cell", "variant"]).loc[("movies->books@0.5", "20")]
    assert (row["task"], row["source"], row["target"], row["ratio"]) == ("movies->books", "movies", "books", 0.5)
    assert (row["name"], row["params.steps"], row["params.beta"]) == ("steps=20", "20", "0.4")
    assert (row["row"], row["model"]) == ("music", "music")
    per_seed = [row[f"metrics.val_rmse/seed_{seed}"] for seed in range(3)]
    assert row["metrics.val_rmse"] == pytest.approx(sum(per_seed) / 3)
    assert not [name for name in results.trials.columns if "epoch/" in name]
    assert results.finished("search")["best"].sum() == 4
    assert results.tasks() == ["books->movies", "movies->books"]
    assert results.ratios() == [0.2, 0.5]
    assert results.sweeps() == ["activation", "steps"]
    assert results.rows_in("score") == ["music", "global_mean", "item_mean", "source_offset"]
    assert results.finished("score", "item_mean")["model"].unique().tolist() == ["baseline"]
    assert results.searched("music") == ["activation", "dropout", "lr", "steps"]
    assert results.simulated
    assert results.tags["commit"] == ("0123abc",)
    assert [domain["name"] for domain in results.domains] == ["books", "movies"]
    assert results.cells[0]["overlapping"] == 150


def test_config_and_epochs_on_demand(results: Results) -> None:
    first = results.finished("search").iloc[0]
    assert results.config(first["run_id"])["config"]["lr"] == pytest.approx(float(first["params.lr"]))
    curve = results.epochs(first["run_id"], "val_rmse")
    assert curve["epoch"].tolist() == list(range(15))
    assert curve["value"].iloc[0] == pytest.approx(first["metrics.val_rmse"] + 0.5)
    assert results.epochs(first["run_id"], "never").empty


def test_of_several_runs_of_a_trial_the_newest_finished_one_counts(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for value, status in ((0.9, "FINISHED"), (0.8, "FINISHED"), (0.1, "FAILED")):
        store.add("search", "a->b", 0.2, "0000", with_seeds({"val_rmse": [value]}), status=status)
    store.client.set_terminated(store.client.create_run(store.experiment_id).info.run_id)
    read = load_results(store.uri, store.experiment, MUSIC)
    assert read.trials["metrics.val_rmse"].tolist() == [0.8]
    assert read.duplicates == ("search/a->b@0.2/music/0000",)
    assert read.foreign == 1


def test_runs_that_the_plan_no_longer_asks_for_are_left_out(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    for name, tags in (("0000", {}), ("0001", {"study.superseded": "the space has changed"})):
        store.add("search", "a->b", 0.2, name, {"val_rmse": 0.5}, tags=tags)
    store.add("score", "a->b", 0.4, "test", {"val_rmse": 0.5}, tags={"study.superseded": "cell", "study.error": "x"})
    store.client.set_tag(store.add_data(), "study.superseded", "data")
    read = load_results(store.uri, store.experiment, MUSIC)
    assert read.trials["name"].tolist() == ["0000"]
    assert (read.ratios(), read.cells_of_plan(), read.domains, read.foreign) == ([0.2], ["a->b@0.2"], (), 0)


def test_a_trial_that_names_no_row_is_not_of_a_study(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    run_id = store.add("search", "a->b", 0.2, "0000", {"val_rmse": 0.5})
    store.client.delete_tag(run_id, "study.row")
    assert load_results(store.uri, store.experiment, MUSIC).trials.empty


def test_an_empty_experiment_is_an_empty_study(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    read = load_results(store.uri, store.experiment, MUSIC)
    assert read.trials.empty
    assert read.finished("search").empty
    assert (read.tasks(), read.ratios(), read.sweeps(), read.searched("music"), read.domains) == ([], [], [], [], ())


def test_a_store_without_the_study_is_an_error_and_stays_as_it_was(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no experiment 'other'; run `study run` on the plan first"):
        load_results(store.uri, "other", MUSIC)
    with pytest.raises(InputError, match=r"none\.db: there is no such store; run `study run` on the plan first"):
        load_results(f"sqlite:///{tmp_path / 'none.db'}", "tiny", MUSIC)
    assert not list(tmp_path.iterdir())


def test_a_missing_artifact_is_one_line(store: Store, results: Results) -> None:
    run_id = results.finished("search")["run_id"].iloc[0]
    with pytest.raises(
        InputError, match=rf"run {run_id}: has no readable artifact per_user.csv .*; put the file"
    ) as caught:
        results.per_user(run_id)
    assert "\n" not in str(caught.value)


def test_validation_frame_has_no_test_column(tmp_path: Path) -> None:
    store = empty_store(tmp_path)
    metrics = seeds_around(np.random.default_rng(0), 0.9)
    store.add("search", "a->b", 0.2, "0000", {**metrics, "test_rmse": 0.5, "test_rmse/seed_0": 0.5}, config=CONFIG)
    frame = load_results(store.uri, store.experiment, MUSIC).validation()
    assert set(metrics) == {name.removeprefix("metrics.") for name in frame.columns if name.startswith("metrics.")}
