"""The whole engine on a real Ray: exactly the planned work, whatever ends the driver."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from features.errors import InputError
from search_spaces import load_space
from study.engine.optuna_storage import close_storage, open_database, open_journal
from study.engine.run import CellProgress, Progress, RunSummary, run_jobs
from study.provenance import device
from study.specs import Budget, Cell, Cluster, Job, Resources, RowRecipe, SearchSpec, WarmStart
from study.tracking import results, tags
from study.tracking import runs as tracking
from trainables.trial import LEFT

from ...patience import PATIENCE_S

FAKES = Path(__file__).parents[1] / "fakes"
sys.path.insert(0, str(FAKES))
import drive  # noqa: E402 - lives beside the fake trainable, which workers find by PYTHONPATH

CELL = drive.CELLS[0]


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    """One Ray for the module, started by the first call of run_jobs; its workers import the fakes by PYTHONPATH."""
    import ray

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES), prepend=os.pathsep)
        yield
    ray.shutdown()


@pytest.fixture
def home(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    tracking.connect(tracking.default_uri(folder)).search_experiments()
    return folder / "mlflow.db"


def all_runs(home: Path, part: str | None = None) -> list[Any]:
    """All runs of trials, superseded ones included."""
    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("study").experiment_id
    return [run for run in tracking.find_runs(client, experiment, part, superseded=True) if tags.TRIAL in run.data.tags]


def runs(home: Path, part: str | None = None) -> dict[str, Any]:
    """Trial -> the run that counts; fails when a trial has two."""
    counting = [run for run in all_runs(home, part) if tags.SUPERSEDED not in run.data.tags]
    assert max(Counter(run.data.tags[tags.TRIAL] for run in counting).values(), default=0) <= 1
    return {run.data.tags[tags.TRIAL]: run for run in counting}


def superseded(home: Path) -> dict[str, str]:
    """Trial -> why one of its runs counts no more."""
    return {
        run.data.tags[tags.TRIAL]: run.data.tags[tags.SUPERSEDED]
        for run in all_runs(home)
        if tags.SUPERSEDED in run.data.tags
    }


def studies(home: Path, row: str = drive.SUBJECT) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Cell -> the trials of a row's newest study."""
    storage = open_journal(home / "optuna" / "study.log")
    names = [study.study_name.split("/") for study in storage.get_all_studies()]
    return {
        cell: optuna.load_study(study_name=f"{cell}/{owner}/{identity}", storage=storage).trials
        for cell, owner, identity in names
        if owner == row
    }


def fixed(home: Path, name: str, part: str = "sweep:x", row: str = drive.SUBJECT, **config: Any) -> Job:
    return drive.fixed_job(home, name, part, row, **config)


def run_fixed(home: Path, *jobs: Job, on_progress: Any = None, **options: Any) -> RunSummary:
    return run_jobs(drive.recipe(home, **options), jobs, on_progress)


def attempts(home: Path, model: str | None = None, cell: Cell = CELL) -> int:
    """How often a training was begun in a cell."""
    path = home / "tasks" / cell.name / "attempts.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return len([line for line in lines if model in (None, line.split()[2])])


def assert_stores_equal(home: Path, trials: int, row: str = drive.SUBJECT) -> None:
    """Every planned trial of a row is there once and finished in both stores, with the same value."""
    by_trial = {trial: run for trial, run in runs(home, "search").items() if trial.split("/")[2] == row}
    drawn = studies(home, row)
    assert {cell: len(cell_trials) for cell, cell_trials in drawn.items()} == {
        cell.name: trials for cell in drive.CELLS
    }
    assert len(by_trial) == trials * len(drive.CELLS)
    for cell, cell_trials in drawn.items():
        for trial in cell_trials:
            run = by_trial[f"search/{cell}/{row}/{trial.number:04d}"]
            assert (trial.state, run.info.status) == (optuna.trial.TrialState.COMPLETE, "FINISHED")
            assert trial.value == run.data.metrics["val_rmse"]
            assert float(run.data.params["x"]) == trial.params["x"]


def no_run_is_open(home: Path) -> bool:
    client = tracking.connect(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("study")
    open_runs = tracking.find_runs(client, experiment.experiment_id, superseded=True)
    return all(run.info.status != "RUNNING" for run in open_runs)


def test_a_search_runs_once_and_then_does_nothing(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    summary = drive.search(home, 3, seconds=0.02)
    out, err = capfd.readouterr()
    assert (summary.planned, summary.ran, summary.superseded, summary.failures) == (6, 6, 0, ())
    assert_stores_equal(home, 3)
    assert all(re.fullmatch(r"\d+/6 \d", line) for line in out.splitlines()), "nothing but our own progress"
    assert err == ""
    run = runs(home)["search/books->movies@0.2/subject/0001"]
    client = tracking.connect(tracking.default_uri(home))
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "epoch/val_rmse")] == [1, 2, 3, 4]
    assert (run.data.metrics["threads"], run.data.metrics["cuda"]) == (1, 0)
    assert run.data.tags[tags.DEVICE] == device(), "said by the worker: the driver was given no tags"
    config = results.read_config(client.tracking_uri, run.info.run_id)
    assert config["config"] == {**drive.BASE, "seconds": 0.02, "x": float(run.data.params["x"])}
    assert (config["model"], config["row"], config["seeds"], config["name"]) == ("subject", "subject", [0, 1], "0001")

    began = time.monotonic()
    again = drive.search(home, 3, seconds=0.02)
    assert time.monotonic() - began < 5
    assert (again.planned, again.ran) == (6, 0)
    assert attempts(home) == 3

    client.delete_run(run.info.run_id)
    restored = drive.search(home, 3, seconds=0.02)
    assert restored.ran == 1, "a run that a person deleted is trained again, with the parameters that it had"
    assert_stores_equal(home, 3)

    more = drive.search(home, 4, seconds=0.02)
    assert (more.planned, more.ran) == (8, 2), "a larger plan continues the search"
    assert_stores_equal(home, 4)


def test_failures_are_kept_apart(home: Path) -> None:
    kinds = ("", "raise", "nan", "unfinished", "die")
    jobs = [fixed(home, f"fail={kind or 'no'}", fail=kind, seconds=0.02) for kind in kinds]
    summary = run_fixed(home, *jobs)
    reasons = {failure.trial.rpartition("=")[2]: failure.reason for failure in summary.failures}
    assert reasons["raise"] == "ValueError: the data set is empty"
    assert reasons["nan"] == "FloatingPointError: val_rmse is nan at epoch 4"
    assert reasons["unfinished"] == "RuntimeError: fake_trial:run ended without a final report"
    assert reasons["die"].startswith("worker lost: The actor died unexpectedly before finishing this task.")
    assert set(reasons) == {"raise", "nan", "unfinished", "die"}
    by_trial = runs(home)
    assert {trial.rpartition("=")[2]: run.info.status for trial, run in by_trial.items()} == {
        "no": "FINISHED", "raise": "FAILED", "nan": "FAILED", "unfinished": "FAILED", "die": "FAILED",
    }  # fmt: skip
    error = by_trial[jobs[1].trial].data.tags
    assert (error[tags.ERROR], error[tags.FAILURE]) == ("ValueError: the data set is empty", "trial")
    assert by_trial[jobs[4].trial].data.tags[tags.FAILURE] == "worker"

    again = run_fixed(home, *jobs)
    assert again.ran == 4, "failed fixed jobs are tried again, in the same runs"
    assert len(runs(home)) == 5
    assert no_run_is_open(home)


def test_a_failed_draw_is_optuna_s_result(home: Path) -> None:
    summary = drive.search(home, 2, fail="nan")
    assert len(summary.failures) == 4
    states = {trial.state for trials in studies(home).values() for trial in trials}
    assert states == {optuna.trial.TrialState.FAIL}
    assert {run.info.status for run in runs(home).values()} == {"FAILED"}
    again = drive.search(home, 2, fail="nan")
    assert (again.ran, again.failures) == (0, summary.failures)


def test_a_lost_worker_is_not_optuna_s_result(home: Path) -> None:
    summary = drive.search(home, 1, fail="die")
    assert len(summary.failures) == 2
    assert {trial.state for trials in studies(home).values() for trial in trials} == {optuna.trial.TrialState.RUNNING}
    drawn = {cell: trials[0].params for cell, trials in studies(home).items()}
    again = drive.search(home, 1, fail="die")
    assert again.ran == 2
    assert {cell: trials[0].params for cell, trials in studies(home).items()} == drawn


def test_a_trial_whose_process_went_goes_on_from_its_checkpoint(home: Path) -> None:
    job = fixed(home, "x=1", fail="die_once", epochs=6, seconds=0.3)
    summary = run_fixed(home, job)
    assert (summary.ran, summary.failures) == (1, ())
    lines = (home / "tasks" / CELL.name / "epochs.txt").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == [1, 2, 3, 4, 5, 6], "nothing is trained twice"
    assert len({line.split()[2] for line in lines}) == 2, "in two processes"
    (run,) = runs(home).values()
    assert run.info.status == "FINISHED"
    assert run.data.tags[tags.RESTARTS].startswith("1, worker lost: The actor died unexpectedly")
    client = tracking.connect(tracking.default_uri(home))
    steps = [entry.step for entry in client.get_metric_history(run.info.run_id, "epoch/val_rmse")]
    assert steps == [1, 2, 3, 4, 5, 6], "and nothing logged twice"
    assert list((home / "checkpoints" / "study").iterdir()) == [], "it is not kept for longer than it is of use"


def test_a_changed_plan_replaces_its_runs_and_a_changed_mind_has_them_back(home: Path) -> None:
    one, two, three = fixed(home, "x=1", x=0.1), fixed(home, "x=2", x=0.2), fixed(home, "x=2", x=0.3)
    run_fixed(home, one, two)
    before = runs(home)
    summary = run_fixed(home, one, three)
    assert (summary.planned, summary.ran, summary.superseded) == (2, 1, 1)
    after = runs(home)
    assert after[one.trial].info.run_id == before[one.trial].info.run_id
    assert after[two.trial].info.run_id != before[two.trial].info.run_id
    assert after[two.trial].data.params["x"] == "0.3"
    assert superseded(home)[two.trial].startswith("the plan asks for another configuration, data or search")
    back = run_fixed(home, one, two)
    assert (back.ran, back.superseded) == (0, 1)
    assert {trial: run.info.run_id for trial, run in runs(home).items()} == {
        trial: run.info.run_id for trial, run in before.items()
    }
    other = replace(one, task_dir=str(home / "tasks" / "other"))
    Path(other.task_dir).mkdir()
    assert run_fixed(home, other, two).superseded == 1, "other data, other result"
    assert len(all_runs(home)) == 4, "nothing is ever deleted"


def test_a_run_counts_until_the_one_with_more_seeds_is_finished(home: Path) -> None:
    few = fixed(home, "x=1", x=0.1)
    more = replace(few, seeds=(0, 1))
    run_fixed(home, few)

    def counting() -> tuple[str, str]:
        """The one that is finished, of those that are not superseded."""
        client = tracking.connect(tracking.default_uri(home))
        experiment = client.get_experiment_by_name("study").experiment_id
        (run,) = (
            run for run in tracking.find_runs(client, experiment)
            if tags.TRIAL in run.data.tags and run.info.status == "FINISHED"
        )  # fmt: skip
        return run.info.run_id, run.data.params["seeds"]

    before = counting()
    shutil.rmtree(few.task_dir)  # so that the training fails
    summary = run_fixed(home, more)
    assert (summary.ran, len(summary.failures), summary.superseded) == (1, 1, 0)
    assert counting() == before
    back = run_fixed(home, few)
    assert (back.ran, back.superseded) == (0, 1), "the plan asks for the old seeds again: the attempt counts no more"
    assert runs(home)[few.trial].info.run_id == before[0]
    run_fixed(home, more)
    Path(few.task_dir).mkdir()
    summary = run_fixed(home, more)
    assert (summary.ran, summary.failures, summary.superseded) == (1, (), 1)
    assert len(runs(home)) == 1
    assert counting()[1] == "0,1"
    assert superseded(home) == {few.trial: "a run with the seeds that the plan now asks for has taken its place"}
    assert run_fixed(home, few).ran == 0, "it is there, should the plan go back"
    assert counting() == before


def test_a_row_comes_and_goes_without_training_anything_again(home: Path) -> None:
    alone = drive.search(home, 2, epochs=1)
    assert alone.ran == 4
    both = drive.search(home, 2, rows=("subject", "rival"), epochs=1)
    assert (both.planned, both.ran, both.superseded) == (8, 4, 0)
    assert [attempts(home, model) for model in ("subject", "rival")] == [2, 2]
    with_rival = {trial: run.info.run_id for trial, run in runs(home).items()}
    tags_of_rival = runs(home)["search/books->movies@0.5/rival/0001"].data.tags
    assert (tags_of_rival[tags.ROW], tags_of_rival[tags.MODEL]) == ("rival", "rival")
    for row in ("subject", "rival"):
        assert_stores_equal(home, 2, row)

    dropped = drive.search(home, 2, epochs=1)
    assert (dropped.planned, dropped.ran, dropped.superseded) == (4, 0, 4)
    assert {trial.split("/")[2] for trial in runs(home)} == {"subject"}
    assert set(superseded(home).values()) == {"the plan has no such trial any more"}

    again = drive.search(home, 2, rows=("subject", "rival"), epochs=1)
    assert (again.ran, again.superseded) == (0, 0)
    assert {trial: run.info.run_id for trial, run in runs(home).items()} == with_rival
    assert [attempts(home, model) for model in ("subject", "rival")] == [2, 2]


def test_one_row_alone_leaves_the_others_as_they_are(home: Path) -> None:
    rows = ("subject", "rival")
    assert drive.search(home, 1, rows=rows, only=["rival"], epochs=1).ran == 2
    shrunk = drive.search(home, 2, rows=rows, only=["subject"], epochs=1)
    assert (shrunk.planned, shrunk.ran, shrunk.superseded) == (4, 4, 0)
    assert Counter(trial.split("/")[2] for trial in runs(home)) == {"subject": 4, "rival": 2}
    assert superseded(home) == {}
    left = home / "tasks" / LEFT
    left.mkdir(parents=True)
    assert drive.search(home, 2, rows=rows, epochs=1).ran == 2, "what was left of the rival"
    assert not left.exists(), "what trainings leave for the opposite direction goes with the part"


def test_a_part_has_rows_of_several_kinds(home: Path) -> None:
    jobs = [fixed(home, "test", "score", row, x=0.25) for row in ("subject", "rival")]
    jobs += [drive.baseline_job(home, name) for name in ("item_mean", "mean")]
    recipe = drive.recipe(home, ("subject", "rival"), baselines=("item_mean", "mean"))
    summary = run_jobs(recipe, jobs)
    assert (summary.planned, summary.ran, summary.failures) == (4, 4, ())
    logged = {trial.split("/")[2]: run.data for trial, run in runs(home).items()}
    assert {row: data.params["model"] for row, data in logged.items()} == {
        "subject": "subject", "rival": "rival", "item_mean": "baseline", "mean": "baseline"
    }  # fmt: skip
    assert logged["item_mean"].metrics["val_rmse"] == 2.0
    assert run_jobs(recipe, jobs).ran == 0


def test_a_search_shrinks_and_grows_without_training_anything_again(home: Path) -> None:
    drive.search(home, 3, epochs=1)
    shrunk = drive.search(home, 2, epochs=1)
    assert (shrunk.planned, shrunk.ran, shrunk.superseded) == (4, 0, 2)
    grown = drive.search(home, 4, epochs=1)
    assert (grown.planned, grown.ran, grown.superseded) == (8, 2, 0)
    assert attempts(home) == 4
    assert_stores_equal(home, 4)


def test_the_budget_of_a_row_stops_it_alone(home: Path) -> None:
    drive.search(home, 1, rows=("subject", "rival"), seconds=0.1)
    jobs = drive.search_jobs(home, 3, ("subject", "rival"))
    recipe = drive.recipe(home, ("subject", "rival"), search={"trials": 3}, base={**drive.BASE, "seconds": 0.1})
    tiny = replace(recipe.rows["rival"].search, budget=Budget(trial_hours=1e-6))  # type: ignore[type-var]
    recipe = replace(recipe, rows={**recipe.rows, "rival": replace(recipe.rows["rival"], search=tiny)})
    summary = run_jobs(recipe, jobs)
    assert summary.ran == 4, "all that were left of the subject"
    assert summary.stopped is not None
    assert summary.stopped.startswith("search.budget.trial_hours: ")
    assert summary.stopped.endswith(" are spent by row rival")
    assert Counter(trial.split("/")[2] for trial in runs(home)) == {"subject": 6, "rival": 2}
    clock = replace(recipe.rows["rival"].search, budget=Budget(hours=1e-6))  # type: ignore[type-var]
    recipe = replace(recipe, rows={"rival": replace(recipe.rows["rival"], search=clock)})
    alone = run_jobs(replace(recipe, planned={job.trial for job in jobs}), [job for job in jobs if job.row == "rival"])
    assert alone.ran == 0, "the clock is that of all rows and calls"
    assert str(alone.stopped).startswith("search.budget.hours: ")


def test_rows_start_warm_from_the_same_rows_of_another_plan(home: Path) -> None:
    drive.search(home, 2, rows=("subject", "rival"), epochs=1)
    (home / "optuna" / "study.log").rename(home / "optuna" / "old.log")
    drive.search(home, 1, rows=("subject", "third"), how={"warm_start": WarmStart(plan="old")}, epochs=1)

    def origins(row: str) -> list[str]:
        return [trial.user_attrs.get("warm_start", "").partition("/")[2][:8] for trial in studies(home, row)[CELL.name]]

    assert (origins("subject"), origins("third")) == (["subject/", "subject/", ""], [""])


def test_another_space_is_another_search(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive.search(home, 1)
    monkeypatch.setattr(drive, "SPACE", "v:\n  x: {FloatDistribution: {low: 2.0, high: 3.0}}\n")
    summary = drive.search(home, 1)
    assert (summary.ran, summary.superseded) == (2, 2)
    assert all(float(run.data.params["x"]) >= 2 for run in runs(home).values())
    monkeypatch.undo()
    os.chdir(FAKES)
    back = drive.search(home, 1)
    assert (back.ran, back.superseded) == (0, 2), "the first search is still there"
    assert all(float(run.data.params["x"]) <= 1 for run in runs(home).values())


def test_a_lost_journal_costs_training_but_no_trial(home: Path) -> None:
    drive.search(home, 1)
    (home / "optuna" / "study.log").unlink()
    summary = drive.search(home, 1)
    assert (summary.ran, summary.superseded) == (2, 2)
    assert_stores_equal(home, 1)
    assert drive.search(home, 1).ran == 0, "the old results have the draws of a journal that is gone"


def test_optuna_learns_what_only_mlflow_knows(home: Path) -> None:
    """The driver died after closing the run and before telling Optuna."""
    drive.search(home, 1)
    journal = home / "optuna" / "study.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    ends = [line for line in lines if json.loads(line).get("state") == 1 or json.loads(line).get("values")]
    assert len(ends) == 2
    journal.write_bytes(b"".join(line for line in lines if line not in ends))
    assert {trial.state for trials in studies(home).values() for trial in trials} == {optuna.trial.TrialState.RUNNING}
    assert drive.search(home, 1).ran == 0
    assert_stores_equal(home, 1)


def test_one_trial_at_a_time_is_reproducible(home: Path, tmp_path: Path, empty_store: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").write_bytes(empty_store.read_bytes())
    drive.search(home, 12, concurrent=1, epochs=1)
    drive.search(other, 5, concurrent=1, epochs=1)
    drive.search(other, 12, concurrent=1, epochs=1)
    one, two = ({c: [t.params for t in ts] for c, ts in studies(folder).items()} for folder in (home, other))
    assert one == two
    assert len({json.dumps(params) for params in one[CELL.name]}) == 12


def test_a_search_in_a_database(home: Path) -> None:
    """The same draws as with a journal, and a second call finds everything done."""
    how = {"storage": f"sqlite:///{home}/optuna.db", "points_to_evaluate": ({"x": 0.25},)}
    assert drive.search(home, 2, how=how, epochs=1).ran == 4
    assert drive.search(home, 2, how=how, epochs=1).ran == 0
    assert not (home / "optuna").exists()
    logged = {trial: float(run.data.params["x"]) for trial, run in runs(home).items()}
    assert {logged[f"search/{cell.name}/subject/0000"] for cell in drive.CELLS} == {0.25}
    database = open_database(str(how["storage"]), "search.storage")
    names = [study.study_name for study in database.get_all_studies()]
    assert {name.split("/")[0] for name in names} == {"study"}, "the experiment comes first"
    drawn = {
        f"search/{'/'.join(name.split('/')[1:3])}/{trial.number:04d}": trial.params["x"]
        for name in names
        for trial in optuna.load_study(study_name=name, storage=database).trials
    }
    assert drawn == logged
    close_storage(database)


def test_a_worker_that_is_stopped_goes_on_with_the_next_trial(home: Path) -> None:
    """One process: the second trial is bad from its first message on, and the third is trained as if nothing had been.

    The second takes longer to close than the 2 s that Ray waits for by itself, as one does that leaves a large network.
    """
    import analytic

    (home / "space.yaml").write_text(analytic.SPACE)
    task = Path(drive.task_of(home, CELL))
    base = {
        "method": "plain",
        "lr": 0.1,
        "depth": 4,
        "decay": 0.5,
        "cut": 0.0,
        "epochs": 4,
        "seconds": 0.6,
        "close": 3.0,
    }
    points = ({"method": "plain", "lr": 0.01, "depth": 5}, {"method": "plain", "lr": 1.0, "depth": 8}) * 2
    jobs = drive.search_jobs(home, 3, cells=[CELL], seeds=(0,))
    row = RowRecipe(
        trainable="analytic:run", model="fake", base=base, space=load_space(f"{home}/space.yaml/v", analytic.FIELDS),
        search=SearchSpec(
            trials=4, seeds=(0,), points_to_evaluate=points, pruner="MedianPruner", pruner_args={"n_startup_trials": 1}
        ),
    )  # fmt: skip
    recipe = replace(drive.recipe(home, cluster=Cluster(max_concurrent=1)), rows={drive.SUBJECT: row})
    summary = run_jobs(recipe, jobs)
    assert (summary.ran, summary.failures, summary.stopped) == (3, (), None)
    by_number = {int(trial[-4:]): run for trial, run in runs(home).items()}
    assert [by_number[n].info.status for n in range(3)] == ["FINISHED", "KILLED", "FINISHED"]
    assert by_number[1].data.tags[tags.PRUNED] == "after epoch 1 by MedianPruner"
    assert by_number[0].data.metrics["val_rmse"] == by_number[2].data.metrics["val_rmse"] == analytic.value(points[0])
    assert [path.name for path in task.glob("ended-*")] == [f"ended-{analytic.value(points[0]):.6f}"]
    assert [trial.state.name for trial in studies(home)[CELL.name]] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert no_run_is_open(home)


def test_progress_counts(home: Path) -> None:
    seen: list[Progress] = []
    run_fixed(home, fixed(home, "x=1", x=0.3), fixed(home, "x=2", fail="raise"), on_progress=seen.append)
    key = drive.SUBJECT, CELL.name
    assert seen[0] == Progress(total=2, done=0, failed=0, running=0, cells={key: CellProgress(planned=2)})
    last = seen[-1]
    assert (last.total, last.done, last.failed, last.running) == (2, 2, 1, 0)
    assert last.cells == {key: CellProgress(planned=2, ended=2, failed=1, best=pytest.approx(1.0 / 5))}
    assert max(progress.running for progress in seen) <= 2


def test_impossible_resources_are_refused_at_once(home: Path) -> None:
    with pytest.raises(InputError, match=r"resources: a trial asks for 1 GPU, this machine has 0"):
        run_fixed(home, fixed(home, "x=1"), resources=Resources(cpus=1, gpus=1))
    assert no_run_is_open(home)


def test_two_drivers_of_one_study_are_refused(home: Path) -> None:
    with (home / "study.lock").open("w") as file:
        file.write("4242\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"study 'study': process 4242 works on it in .*; wait for it or stop it"):
            run_fixed(home, fixed(home, "x=1"))


def test_an_error_of_the_store_is_raised_and_closes_the_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tracking.PartTracker, "finish", full)
    with pytest.raises(OSError, match="No space left on device"):
        run_fixed(home, *(fixed(home, f"x={number}") for number in range(4)))
    assert no_run_is_open(home)
    assert len(runs(home)) < 4, "it stopped early"
    monkeypatch.undo()
    os.chdir(FAKES)
    assert run_fixed(home, *(fixed(home, f"x={number}") for number in range(4))).failures == ()


def driver(home: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(FAKES / "drive.py"), str(home), *map(str, arguments)],
        cwd=FAKES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], pattern: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return lines
    raise AssertionError(f"the driver ended without {pattern!r}: {''.join(lines)}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_killed_driver_s_work_is_finished_exactly(home: Path, number: signal.Signals) -> None:
    trials = 4
    process = driver(home, trials, 1.0, 2)
    wait_for(process, r"3/8 [12]")
    time.sleep(0.4)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=PATIENCE_S)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert not no_run_is_open(home), "a kill leaves runs open; the next driver has to settle them"
    else:
        assert "KeyboardInterrupt" in rest
        assert "Fatal Python error" not in rest
        assert no_run_is_open(home)
        assert "KILLED" in {run.info.status for run in runs(home).values()}
    done = sum(run.info.status == "FINISHED" for run in runs(home).values())
    assert 3 <= done < 8
    summary = drive.search(home, trials, seconds=1.0)
    assert (summary.planned, summary.failures) == (8, ())
    assert summary.ran <= 8 - done
    assert_stores_equal(home, trials)
    assert no_run_is_open(home)
    marks = [home / "tasks" / cell.name / "epochs.txt" for cell in drive.CELLS]
    trained = [line for path in marks for line in path.read_text().splitlines()]
    assert len(trained) <= 8 * 4 + 2, "of what was in progress, at most the epoch since the checkpoint is trained again"
    for run in runs(home).values():
        client = tracking.connect(tracking.default_uri(home))
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, "epoch/val_rmse")]
        assert steps == [1, 2, 3, 4], "no epoch is missing and none is logged twice"


def test_cells_of_other_names_do_not_collide(home: Path) -> None:
    jobs = [
        replace(fixed(home, "wo_side", "ablate", x=0.1), cell=Cell(source="a", target=target, ratio=0.5))
        for target in ("b", "c")
    ]
    summary = run_fixed(home, *jobs, cluster=Cluster(max_concurrent=1))
    assert (summary.ran, len(runs(home))) == (2, 2)
