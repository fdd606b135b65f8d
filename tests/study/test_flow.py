"""A whole study through Ray, Optuna and MLflow: what is left behind, what a second run does, and that nothing leaks."""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from features.errors import InputError
from features.extraction.workers import Actors
from study.engine.optuna_storage import open_journal
from study.engine.run import RunSummary
from study.plan.load import load_plan
from study.specs import Cluster, Recipe
from study.study import Study
from study.tracking.results import Results, load_results
from study.tracking.runs import connect, default_uri, find_runs
from trainables.interface import check_model

from ..patience import PATIENCE_S
from .conftest import Finished
from .store import MUSIC
from .tiny import PLAN, WORK, change_reviews, study, write_plan

CELLS = ["books->movies@0.2", "books->movies@0.5"]


@pytest.fixture(scope="module")
def results(finished: Finished) -> Results:
    return load_results(default_uri(finished.home), "tiny", MUSIC)


def runs(home: Path, part: str | None = None) -> list[Any]:
    """Trials' runs as MLflow has them."""
    client = connect(default_uri(home))
    experiment = client.get_experiment_by_name("tiny")
    return [r for r in find_runs(client, experiment.experiment_id, part) if "study.cell" in r.data.tags]


def test_everything_is_finished_once(finished: Finished, results: Results) -> None:
    assert dict(results.trials.groupby("part").size()) == WORK
    assert set(results.trials["status"]) == {"FINISHED"}
    assert results.duplicates == ()
    assert results.simulated
    client = connect(default_uri(finished.home))
    experiment = client.get_experiment_by_name("tiny")
    every = list(find_runs(client, experiment.experiment_id))
    assert {run.info.status for run in every} == {"FINISHED"}
    parents = {run.info.run_name: run.info.run_id for run in every if "study.cell" not in run.data.tags}
    assert set(parents) == {"data", "report", *WORK}
    for run in runs(finished.home):
        assert run.data.tags["mlflow.parentRunId"] == parents[run.data.tags["study.part"]]


def test_an_extraction_on_a_cluster_asks_for_what_it_may_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: Any, **how: Any) -> None:
        raise InputError(f"{how}")

    monkeypatch.setattr("study.engine.launch.connect", lambda cluster: None)
    monkeypatch.setattr("study.engine.launch.most_actors", lambda cluster: Actors(5, on_gpu=True))
    monkeypatch.setattr("study.study.prepare", prepare)
    study = Study(load_plan(str(write_plan(tmp_path))), home=tmp_path, cluster=Cluster(address="auto"))
    with pytest.raises(
        InputError, match=r"^\{'only': \(\), 'on_ray': True, 'actors': Actors\(count=5, on_gpu=True\)\}$"
    ):
        study.extract()


def test_names_and_configurations(results: Results) -> None:
    names = {part: sorted(set(rows["name"])) for part, rows in results.trials.groupby("part")}
    assert names == {
        "search": ["0000", "0001"],
        "sweep:steps": ["steps=2", "steps=5"],
        "ablate": ["full", "wo_side"],
        "score": ["test"],
    }
    best = results.trials[results.trials["best"]].set_index("cell")
    assert sorted(best.index) == CELLS
    for row in results.trials.to_dict("records"):
        if row["model"] == "baseline":
            continue
        assert row["params.epochs"] == str(PLAN["base"]["epochs"])
        if row["part"] == "search":
            continue
        chosen = best.loc[row["cell"]]
        for field in ("lr", "steps", "side"):
            varied = {"sweep:steps": "steps", "ablate": "side" if row["name"] == "wo_side" else ""}.get(row["part"])
            if field != varied:
                assert row[f"params.{field}"] == chosen[f"params.{field}"], (row["name"], field)
        if row["part"] == "sweep:steps":
            assert row["name"] == f"steps={row['params.steps']}"
        if row["name"] == "wo_side":
            assert row["params.side"] == "False"


def test_the_best_trial_has_the_least_validation_error(results: Results) -> None:
    search = results.finished("search")
    assert sorted(search["cell"].unique()) == CELLS
    for _, rows in search.groupby("cell"):
        assert rows["best"].sum() == 1
        assert rows.loc[rows["best"], "metrics.val_rmse"].item() == rows["metrics.val_rmse"].min()


def test_only_scores_know_the_test_users(finished: Finished, results: Results) -> None:
    tests = [name for name in results.trials.columns if str(name).startswith("metrics.test_")]
    assert len(tests) > 5
    others = results.trials[results.trials["part"] != "score"]
    assert others[tests].isna().all(axis=None)
    assert results.finished("score")["metrics.test_rmse"].notna().all()
    for run in runs(finished.home):
        config = results.config(run.info.run_id)
        of_score = run.data.tags["study.part"] == "score"
        assert (config["test_dir"] is not None) == of_score
        assert Path(config["task_dir"]).name == "search"
        assert not (Path(config["task_dir"]) / "test").exists()
        assert "test" not in " ".join([*run.data.params, *run.data.params.values()])
        assert of_score or not any("test" in name for name in run.data.metrics)


def test_every_run_says_where_its_numbers_come_from(results: Results, finished: Finished) -> None:
    for run in runs(finished.home):
        tags = run.data.tags
        assert tags["study.command"].startswith(f"study rerun {run.info.run_id}")
        assert tags["study.simulated"] == "true"
        for name in ("data_key", "feature_key", "commit", "versions", "device"):
            assert tags[f"study.{name}"], name
    assert {name: len(values) for name, values in results.tags.items()} == dict.fromkeys(results.tags, 1)


def test_the_report_is_drawn(finished: Finished) -> None:
    report = finished.home / "reports" / "tiny"
    assert (report / "report.html").stat().st_size > 1000
    for number in (1, 2, 3, 4):
        assert len(list(report.rglob(f"table_{number}*.csv"))) >= 1
    steps = pd.read_csv(next(report.rglob("figure_3_steps*.csv")))
    assert len(steps) >= 4


def test_the_pages_commands_work_from_another_folder(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = html.unescape((finished.home / "reports" / "tiny" / "report.html").read_text())
    (found,) = re.findall(r"<code>(study sweep .*) && (study report .* --only figure_3_steps)</code>", page)
    sweep, redraw = (shlex.split(command) for command in found)
    assert sweep == ["study", "sweep", str(finished.plan), "--home", str(finished.home)]
    monkeypatch.chdir(tmp_path)
    ran = study(*redraw[1:])
    assert ran.code == 0
    assert f"figure  {finished.home}/reports/tiny/figures/figure_3_steps.png\n" in ran.out


def test_a_second_run_trains_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ray(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to launch")

    def judged_again(*_: Any) -> None:
        raise AssertionError("the report run says how many claims hold")

    monkeypatch.setattr("study.engine.launch.launch", no_ray)
    monkeypatch.setattr("study.report.report.judge", judged_again)
    monkeypatch.setattr("study.study.judge", judged_again)
    before = {run.info.run_id: run.info.end_time for run in runs(finished.home)}
    began = time.process_time()
    ran = study("run", finished.plan, "--home", finished.home)
    assert time.process_time() - began < 15, "seconds of this process, on a machine that others use"
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("nothing left to do") == len(WORK)
    assert "Nothing was left to train" in ran.out
    assert "source_offset" in ran.out
    claims = re.search(r"claims: .* undecided", finished.ran.out)
    assert claims is not None
    assert claims[0] in ran.out
    assert {run.info.run_id: run.info.end_time for run in runs(finished.home)} == before


def test_trials_are_asked_for_by_their_models_version(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def no_jobs(recipe: Recipe, *_: Any, **__: Any) -> RunSummary:
        asked.append({name: row.version for name, row in recipe.rows.items()})
        return RunSummary(planned=0, ran=0, superseded=0, failures=(), stopped=None)

    monkeypatch.setattr("study.study.run_jobs", no_jobs)
    monkeypatch.setattr("trainables.models.music.VERSION", 7, raising=False)
    check_model.cache_clear()
    try:
        Study(finished.plan, home=finished.home).run_part("ablate")
    finally:
        check_model.cache_clear()
    assert asked == [{"music": 7}]


def test_status_counts_what_a_larger_plan_lacks(finished: Finished, tmp_path: Path) -> None:
    larger = load_plan(str(write_plan(tmp_path, search__trials=5, sweeps__steps__values=[2, 5, 10])))
    status = Study(larger, home=finished.home).status()
    assert {(row.part, row.row): (row.planned, row.finished, row.left) for row in status} == {
        ("search", "music"): (10, 4, 6), ("sweep:steps", "music"): (6, 4, 2), ("ablate", "music"): (4, 4, 0),
        ("score", "baselines"): (6, 6, 0), ("score", "music"): (2, 2, 0),
    }  # fmt: skip


@pytest.mark.usefixtures("fresh_ray")
def test_without_a_search_everything_starts_from_base(tmp_path: Path) -> None:
    plan = write_plan(
        tmp_path, drop=("search", "ablate", "score"), cold_ratios=[0.5], base={**PLAN["base"], "lr": 0.005},
        sweeps={"steps": {"values": [5], "seeds": [0]}},
    )  # fmt: skip
    ran = study("run", plan, "--home", tmp_path / "home")
    assert (ran.code, ran.err) == (0, ""), ran
    assert "sweep:steps: 1 planned, 1 trials run" in ran.out
    (run,) = runs(tmp_path / "home")
    assert (run.info.status, run.data.params["steps"], run.data.params["lr"]) == ("FINISHED", "5", "0.005")
    assert "run `study score`" in ran.out, "what is missing is said, and no reason to fail"


@pytest.mark.usefixtures("fresh_ray")
def test_reviews_of_test_users_change_no_validation_and_no_choice(
    finished: Finished, results: Results, raw: Path, tmp_path: Path
) -> None:
    """Every target rating and text of the test users of a cell is another one; its search does not notice."""
    cell, original = CELLS[1], task_folder(finished.home, 0.5)
    test_users = set(np.load(original / "test" / "user_id.npy"))
    data = shutil.copytree(raw, tmp_path / "data")
    changed = 0

    def spoil(review: dict[str, Any]) -> dict[str, Any]:
        nonlocal changed
        if review["user_id"] not in test_users:
            return review
        changed += 1
        return {**review, "rating": 6.0 - review["rating"] if review["rating"] != 3 else 5.0, "text": "changed"}

    change_reviews(data / "movies.jsonl.gz", spoil)
    plan = write_plan(tmp_path, drop=("simulate", "sweeps", "ablate", "score"), cold_ratios=[0.5])
    home = tmp_path / "home"
    ran = study("search", plan, "--data", data, "--home", home)
    assert (ran.code, ran.err) == (0, ""), ran

    task = task_folder(home, 0.5)
    before, after = (np.load(folder / "test" / "rating.npy") for folder in (original, task))
    assert len(before) == changed > 100
    assert (before != after).all()
    arrays = [path.relative_to(original) for path in (original / "search").rglob("*.npy")]
    assert len(arrays) > 10
    assert all((original / path).read_bytes() == (task / path).read_bytes() for path in arrays)

    mine, theirs = results, load_results(default_uri(home), "tiny", MUSIC)
    shared = [str(name) for name in theirs.trials.columns if str(name).startswith(("params.", "metrics."))]
    columns = ["name", "best", *(name for name in shared if "seconds" not in name)]
    tables = []
    for found in (mine, theirs):
        rows = found.finished("search")
        rows = rows[rows["cell"] == cell].sort_values("name", ignore_index=True)
        tables.append(rows[columns])
    assert len(tables[1]) == 2
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    chosen = [
        Study(load_plan(str(p)), home=h).best()["music", cell]
        for p, h in ((finished.plan, finished.home), (plan, home))
    ]
    assert chosen[0][0].value == chosen[1][0].value
    assert chosen[0][1]["config"] == chosen[1][1]["config"]


def task_folder(home: Path, ratio: float) -> Path:
    """The task of a cold ratio."""
    import json

    (found,) = (
        path.parent
        for path in home.glob("tasks/*/manifest.json")
        if json.loads(path.read_text())["split"]["cold_ratio"] == ratio
    )
    return found


@pytest.fixture
def fresh_ray() -> Any:
    """Ray started by the test and stopped after it: other tests start it with another working directory."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


def test_a_killed_run_is_finished_exactly(tmp_path: Path) -> None:
    home, trials = tmp_path / "home", 5
    base = {**PLAN["base"], "epochs": 300, "patience": 300}
    plan = write_plan(
        tmp_path,
        drop=("sweeps", "ablate", "score"),
        cold_ratios=[0.5],
        base=base,
        search={"trials": trials, "seeds": [0]},
    )
    command = [sys.executable, "-m", "study", "run", str(plan), "--home", str(home), "--max-concurrent", "1"]
    with (tmp_path / "out.txt").open("w") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: finished_trials(home) >= 1 or driver.poll() is not None, PATIENCE_S)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    assert driver.returncode == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
    done = {run.data.tags["study.trial"]: run.info for run in runs(home) if run.info.status == "FINISHED"}
    assert 1 <= len(done) < trials
    (row,) = Study(load_plan(str(plan)), home=home).status()
    assert (row.planned, row.finished, row.running, row.left) == (trials, len(done), 0, trials - len(done))

    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert again.returncode == 0, again.stderr
    assert "Traceback" not in again.stderr  # Optuna may say that the dead driver held its lock
    assert f"search: {trials} planned, {trials - len(done)} trials run" in again.stdout
    found = {run.data.tags["study.trial"]: run for run in runs(home)}
    assert len(runs(home)) == len(found) == trials
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    for trial, info in done.items():
        assert (found[trial].info.run_id, found[trial].info.end_time) == (info.run_id, info.end_time)
    import optuna

    storage = open_journal(home / "optuna" / "tiny.log")
    (name,) = optuna.get_all_study_names(storage)
    told = optuna.load_study(study_name=name, storage=storage).trials
    assert [trial.state for trial in told] == [optuna.trial.TrialState.COMPLETE] * trials
    values = [run.data.metrics["val_rmse"] for _, run in sorted(found.items())]
    assert [trial.value for trial in told] == values
    assert sum(run.data.tags.get("study.best") == "true" for run in found.values()) == 1


def finished_trials(home: Path) -> int:
    """Finished trials, read beside the driver that writes them."""
    if not (home / "mlflow.db").is_file():
        return 0
    store = sqlite3.connect(f"file:{home}/mlflow.db?mode=ro", uri=True)
    try:
        query = "select count(*) from runs where status = 'FINISHED' and name like '% search %'"
        return int(store.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # its tables are being made
        return 0
    finally:
        store.close()


def wait_for(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def test_nothing_of_a_study_is_written_elsewhere(finished: Finished) -> None:
    assert sorted(path.name for path in finished.home.iterdir() if not path.name.startswith(".")) == [
        "artifacts", "domains", "logs", "mlflow.db", "optuna", "plans", "ray", "reports", "simulated", "tasks",
        "tiny.lock",
    ]  # fmt: skip
    assert not os.path.exists("mlruns")
    assert not os.path.exists("mlflow.db")
