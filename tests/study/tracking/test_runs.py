"""MLflow: runs found by tag and continued, closed truthfully, nothing logged twice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest
import yaml
from study.tracking.pareto import front, mark_front

from features.errors import InputError
from study.report.figures.tradeoffs import pareto
from study.specs import Cell, Job, Objective
from study.tracking import results
from study.tracking import runs as tracking
from study.tracking.runs import EpochReport, PartTracker

from ..store import MUSIC

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CELL = Cell(source="books", target="movies", ratio=0.2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One SQLite store for the module: making its tables takes seconds. Each test has an experiment of its own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def part(store: Path, request: pytest.FixtureRequest) -> Part:
    return Part(store, request.node.name)


class Part:
    """An experiment that can be opened again, as a new driver does."""

    def __init__(self, home: Path, experiment: str) -> None:
        self.home = home
        self.experiment = experiment
        self.client: MlflowClient = tracking.connect(tracking.default_uri(home))
        self.id = tracking.open_experiment(self.client, experiment, home / "artifacts")

    def open(self, name: str = "search", **tags: str) -> PartTracker:
        return tracking.open_part(
            home=self.home, uri=None, experiment=self.experiment, part=name, tags=tags, metric="val_rmse"
        )

    def runs(self) -> dict[str, Any]:
        return {run.info.run_name: run for run in tracking.find_runs(self.client, self.id)}

    def series(self, run_id: str, key: str) -> list[tuple[int, float]]:
        return [(entry.step, entry.value) for entry in self.client.get_metric_history(run_id, key)]


def job(name: str, part: str = "search", ratio: float = 0.2) -> Job:
    cell = Cell(source="books", target="movies", ratio=ratio)
    return Job(part=part, cell=cell, name=name, config={}, seeds=(0, 1), features="main", task_dir="task")


def start(tracker: PartTracker, this: Job, **config: Any) -> None:
    tracker.start(this, config=config, logged={"config": config, "seeds": [0, 1]}, fingerprint="f")


def epoch(number: int, value: float) -> EpochReport:
    return EpochReport(epoch=number, metrics={"val_rmse": value}, final=False, artifacts={}, time_ms=1000 + number)


def final(value: float, **artifacts: str | bytes) -> EpochReport:
    metrics = {"val_rmse": value, "val_rmse/seed_0": value}
    return EpochReport(epoch=9, metrics=metrics, final=True, artifacts=artifacts, time_ms=2000)


def test_a_finished_trial_has_all_that_the_ui_needs(part: Part, tmp_path: Path) -> None:
    tracker = part.open(**{"study.commit": "abc"})
    tracker.start_part()
    start(tracker, job("0000"), lr=1e-5, side=True)
    tracker.report("search/books->movies@0.2/0000", [epoch(1, 1.5), epoch(2, 1.25), final(1.125)])
    tracker.finish(
        "search/books->movies@0.2/0000", final(1.125, **{"per_user.csv": "seed,user\n", "raw.bin": b"\x00\xff"})
    )
    tracker.end_part("FINISHED")
    runs = part.runs()
    assert set(runs) == {"search", "books->movies@0.2 search 0000"}
    run, parent = runs["books->movies@0.2 search 0000"], runs["search"]
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    run_id = run.info.run_id
    expected = {
        "study.part": "search",
        "study.trial": "search/books->movies@0.2/0000",
        "study.cell": "books->movies@0.2",
        "study.task": "books->movies",
        "study.ratio": "0.2",
        "study.commit": "abc",
        "study.fingerprint": "f",
        "study.command": f"study rerun {run_id} --home {part.home}",
        "mlflow.parentRunId": parent.info.run_id,
    }
    assert expected.items() <= run.data.tags.items()
    assert run.data.params == {
        "lr": "1e-05", "side": "True", "task": "books->movies", "source": "books", "target": "movies", "ratio": "0.2",
        "seeds": "0,1", "features": "main",
    }  # fmt: skip
    assert run.data.metrics == {"val_rmse": 1.125, "val_rmse/seed_0": 1.125, "epoch/val_rmse": 1.25}
    assert part.series(run_id, "epoch/val_rmse") == [(1, 1.5), (2, 1.25)]
    assert part.client.get_metric_history(run_id, "epoch/val_rmse")[0].timestamp == 1001
    assert {file.path for file in part.client.list_artifacts(run_id)} == {"config.yaml", "per_user.csv", "raw.bin"}
    assert Path(part.client.download_artifacts(run_id, "raw.bin", str(tmp_path))).read_bytes() == b"\x00\xff"
    assert results.read_config(part.client.tracking_uri, run_id) == {
        "config": {"lr": 1e-5, "side": True},
        "seeds": [0, 1],
    }
    assert part.home in Path(run.info.artifact_uri.removeprefix("file://")).parents


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("postgresql://me:secret@db:5432/mlflow?a=1&b=2", "'postgresql://me@db:5432/mlflow?a=1&b=2'"),
    ],
)
def test_the_command_names_the_server(part: Part, uri: str, shown: str) -> None:
    tracker = PartTracker(
        client=part.client, experiment_id=part.id, part="search", tags={}, metric="val_rmse", home=Path("/h"), uri=uri
    )
    tracker.start_part()
    start(tracker, job("0000"))
    run = part.runs()["books->movies@0.2 search 0000"]
    assert run.data.tags["study.command"] == f"MLFLOW_TRACKING_URI={shown} study rerun {run.info.run_id} --home /h"


def test_the_machine_is_that_of_the_process_that_trained(part: Part) -> None:
    tracker = part.open(**{"study.device": "the driver's", "study.commit": "abc"})
    tracker.start_part()
    start(tracker, job("0000"))
    tracker.finish(job("0000").trial, replace(final(1.0), tags={"study.device": "H100"}))
    tags = part.runs()["books->movies@0.2 search 0000"].data.tags
    assert (tags["study.device"], tags["study.commit"]) == ("H100", "abc")


def test_variants_are_tagged(part: Part) -> None:
    for name, part_name, variant in (
        ("steps=10", "sweep:steps", "10"),
        ("wo_side", "ablate", "wo_side"),
        ("best", "score", None),
    ):
        tracker = part.open(part_name)
        tracker.start_part()
        start(tracker, job(name, part_name))
        tracker.end_part("KILLED")
        run = part.runs()[f"books->movies@0.2 {part_name} {name}"]
        assert run.data.tags.get("study.variant") == variant


def test_a_failure_keeps_its_reason_and_is_continued(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    trial = job("0000").trial
    tracker.report(trial, [epoch(1, 1.5)])
    tracker.fail(trial, failure="trial", reason="ValueError: empty", detail="Traceback\nValueError: empty\n")
    tracker.end_part("FINISHED")
    again = part.open()
    run = again.runs[trial]
    assert (run.status, run.failure, run.reason) == ("FAILED", "trial", "ValueError: empty")
    assert {file.path for file in part.client.list_artifacts(run.run_id)} == {"config.yaml", "error.txt"}
    again.start_part()
    start(again, job("0000"))
    continued = part.client.get_run(run.run_id)
    assert continued.info.status == "RUNNING"
    assert "study.error" not in continued.data.tags
    again.report(trial, [epoch(1, 1.5), epoch(2, 1.0)])
    again.finish(trial, final(1.0))
    again.end_part("FINISHED")
    assert len(part.runs()) == 2
    assert part.series(run.run_id, "epoch/val_rmse") == [(1, 1.5), (2, 1.0)], "no epoch is logged twice"
    assert part.client.get_run(run.run_id).info.status == "FINISHED"


def test_what_a_dead_driver_left_open_is_settled(part: Part) -> None:
    dead = part.open()
    dead.start_part()
    for name in ("0000", "0001"):
        start(dead, job(name))
    # It died between the final metrics of 0000 and the closing of the run, and in the middle of 0001.
    run_id = dead._open[job("0000").trial].run_id
    dead._log(run_id, metrics=[("val_rmse", 1.0, 0, 0)])
    assert [run.info.status for run in part.runs().values()] == ["RUNNING"] * 3
    tracker = part.open()
    assert tracker.runs[job("0000").trial].status == "FINISHED"
    assert tracker.runs[job("0001").trial].status == "KILLED"
    tracker.end_part("FINISHED")
    status = {name: run.info.status for name, run in part.runs().items()}
    assert status == {
        "search": "FINISHED",
        "books->movies@0.2 search 0000": "FINISHED",
        "books->movies@0.2 search 0001": "KILLED",
    }


def test_leaving_a_part_closes_its_runs_as_killed(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    tracker.report(job("0000").trial, [epoch(1, 1.5)])
    tracker.end_part("KILLED")
    runs = part.runs()
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    trial_run = runs["books->movies@0.2 search 0000"]
    assert part.series(trial_run.info.run_id, "epoch/val_rmse") == [(1, 1.5)], "what was reported is kept"


def test_what_a_trial_cost_is_the_time_it_ran_and_not_the_time_between(part: Part) -> None:
    def stopped(*, seconds: float | None = None) -> float:
        """What the trial took by then."""
        tracker = part.open()
        tracker.start_part()
        start(tracker, job("0000"))
        if seconds is not None:
            tracker.finish(job("0000").trial, replace(final(1.0), metrics={"val_rmse": 1.0, "seconds": seconds}))
        tracker.end_part("KILLED")
        (spent,) = results.load_results(part.client.tracking_uri, part.experiment, MUSIC).trials["spent"]
        return float(spent)

    assert 0 <= stopped() < 100
    part.client.set_tag(part.runs()["books->movies@0.2 search 0000"].info.run_id, "study.spent", "1000")
    assert 1000 <= stopped() < 1100
    assert stopped(seconds=42.0) == 42.0, "the worker's clock goes on from its checkpoint"


def test_other_parts_are_left_alone(part: Part) -> None:
    search = part.open("search")
    search.start_part()
    start(search, job("0000"))
    assert part.open("score").runs == {}
    assert part.runs()["search"].info.status == "RUNNING"
    search.end_part("KILLED")


def test_a_dropped_run_is_restorable(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    tracker.finish(job("0000").trial, final(1.0))
    tracker.end_part("FINISHED")
    again = part.open()
    run_id = again.runs[job("0000").trial].run_id
    again.drop(job("0000").trial, "another plan")
    assert set(part.runs()) == {"search"}
    deleted = part.client.get_run(run_id)
    assert deleted.info.lifecycle_stage == "deleted"
    assert deleted.data.tags["study.superseded"] == "another plan"


def test_a_run_that_was_replaced_goes_even_after_a_death_in_between(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    trial = job("0000").trial
    start(tracker, job("0000"))
    tracker.finish(trial, final(1.0))
    again = part.open()
    old = again.runs[trial].run_id
    again.replace(trial)
    again.start_part()
    start(again, job("0000"))
    new = again._open[trial].run_id
    assert new != old
    # The driver dies after the closing of the new run and before the old one is dropped.
    again._log(new, metrics=[("val_rmse", 0.5, 0, 0)])
    again._close(trial, "FINISHED")
    third = part.open()
    assert (third.runs[trial].run_id, third.dropped) == (new, 1)
    assert part.client.get_run(old).info.lifecycle_stage == "deleted"
    assert part.runs()["books->movies@0.2 search 0000"].info.run_id == new


def test_epochs_of_a_long_trial_are_sent_on_the_way(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    run_id = tracker._open[job("0000").trial].run_id
    tracker.report(job("0000").trial, [epoch(1, 1.5)])
    assert part.series(run_id, "epoch/val_rmse") == []
    monkeypatch.setattr(tracking, "_FLUSH_S", 0.0)
    tracker.report(job("0000").trial, [epoch(2, 1.25)])
    assert part.series(run_id, "epoch/val_rmse") == [(1, 1.5), (2, 1.25)]
    tracker.report(job("0000").trial, [epoch(number, 1.0) for number in range(3, 2600)])
    assert len(part.series(run_id, "epoch/val_rmse")) == 2599, "more than one batch of MLflow"
    tracker.end_part("KILLED")


def finished(part: Part, values: dict[tuple[float, str], float]) -> None:
    tracker = part.open()
    tracker.start_part()
    for (ratio, name), value in values.items():
        this = job(name, ratio=ratio)
        if this.trial not in tracker.runs:
            start(tracker, this)
            tracker.finish(this.trial, final(value))
    tracker.end_part("FINISHED")


def best(part: Part) -> dict[str, str]:
    return {
        run.info.run_name: run.data.tags["study.best"] for run in part.runs().values() if "study.best" in run.data.tags
    }


def test_one_best_trial_per_cell(part: Part) -> None:
    values = {(0.2, "0000"): 1.0, (0.2, "0001"): 0.5, (0.2, "0002"): 0.5, (0.5, "0000"): 2.0}
    finished(part, values)
    chosen = tracking.mark_best(part.client, part.id, metric="val_rmse", direction="minimize")
    assert set(chosen) == {"books->movies@0.2", "books->movies@0.5"}
    assert best(part) == {"books->movies@0.2 search 0001": "true", "books->movies@0.5 search 0000": "true"}
    finished(part, {**values, (0.2, "0003"): 0.25})
    tracking.mark_best(part.client, part.id, metric="val_rmse", direction="minimize")
    assert best(part) == {"books->movies@0.2 search 0003": "true", "books->movies@0.5 search 0000": "true"}
    chosen = tracking.mark_best(part.client, part.id, metric="val_rmse", direction="maximize")
    assert best(part) == {"books->movies@0.2 search 0000": "true", "books->movies@0.5 search 0000": "true"}
    tags = part.client.get_experiment(part.id).tags
    first, *_ = lines = tags["mlflow.note.content"].splitlines()
    shown = lines[6:]
    links = [f"(#/experiments/{part.id}/runs/{chosen[cell]}) | {value:.4f} |" for cell, value in
             (("books->movies@0.2", 1.0), ("books->movies@0.5", 2.0))]  # fmt: skip
    assert [link in line for link, line in zip(links, shown, strict=True)] == [True, True]
    views = {
        key: json.loads(tags[f"mlflow.sharedViewState.{key}"])
        for key in re.findall(r"ShareKey=([\w-]+)", "".join(lines))
    }
    assert list(views) == ["best", "search", "score", "cell-0", "cell-1"]
    assert first.startswith(f"[{views['best']['name']}](#/experiments/{part.id}/runs?viewStateShareKey=best)")
    state = json.loads(views["cell-1"]["state"])
    assert state["searchFilter"].endswith("tags.\"study.cell\" = 'books->movies@0.5'")
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val_rmse`", False)
    assert state["compareRunCharts"][0]["selectedMetrics"] == ["val_rmse"]


BOTH = (Objective(metric="val_rmse", direction="minimize"), Objective(metric="val_ndcg20", direction="maximize"))


def test_the_pareto_front_is_that_of_optuna() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 7, 60):
        values = generator.integers(0, 12, size=(count, 2)).astype(float)
        study = optuna.create_study(directions=["minimize", "maximize"])
        study.add_trials([optuna.trial.create_trial(values=list(row)) for row in values])
        assert [n for n, on in enumerate(front(values, BOTH)) if on] == sorted(t.number for t in study.best_trials)
    assert front([], BOTH) == []


def test_runs_on_the_front_are_tagged_and_the_report_draws_them(part: Part) -> None:
    def tagged(trials: dict[str, tuple[float, float]]) -> set[str]:
        tracker = part.open()
        tracker.start_part()
        for name, (rmse, ndcg) in trials.items():
            start(tracker, job(name))
            report = final(rmse)
            tracker.finish(job(name).trial, replace(report, metrics={**report.metrics, "val_mae": ndcg}))
        tracker.end_part("FINISHED")
        mark_front(part.client, part.id, objectives)
        return {run.data.tags["study.trial"][-4:] for run in part.runs().values() if "study.pareto" in run.data.tags}

    objectives: tuple[Objective, ...] = (BOTH[0], Objective(metric="val_mae", direction="minimize"))
    assert tagged({"0000": (1.0, 0.1), "0001": (0.5, 0.2), "0002": (1.1, 0.15)}) == {"0000", "0001"}
    assert tagged({"0003": (0.9, 0.05)}) == {"0001", "0003"}, "a better trial takes the tag away"
    experiment = part.client.get_experiment(part.id).name
    figure = pareto(results.load_results(part.client.tracking_uri, experiment, MUSIC))
    assert (figure.x, figure.y) == ("val_rmse", "val_mae")
    points = figure.points()
    assert list(points["val_rmse"]) == [1.0, 0.5, 1.1, 0.9]
    assert list(points["on_front"]) == [False, True, False, True]
    assert part.runs()["search"].data.tags["study.objectives"] == "val_rmse,val_mae"
    objectives = ()
    assert tagged({"0004": (0.1, 0.01)}) == set(), "the plan has gone back to one objective"
    assert "study.objectives" not in part.runs()["search"].data.tags


def test_a_run_without_a_config_cannot_be_read(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    tracker.end_part("FINISHED")
    with pytest.raises(InputError, match=r"has no readable artifact config.yaml .*; give the id of a trial"):
        results.read_config(part.client.tracking_uri, part.runs()["search"].info.run_id)
    with pytest.raises(InputError, match=r"run nonsense: is not in sqlite:.*; give the id of a trial"):
        results.read_config(part.client.tracking_uri, "nonsense")
    run_id = part.runs()["search"].info.run_id
    part.client.log_text(run_id, yaml.safe_dump([1]), "config.yaml")
    with pytest.raises(InputError, match="must be a mapping, is list"):
        results.read_config(part.client.tracking_uri, run_id)


def test_a_deleted_experiment_is_not_revived(part: Part) -> None:
    part.client.delete_experiment(part.id)
    with pytest.raises(InputError, match="is deleted in MLflow; restore it there or give the plan another name"):
        part.open()
