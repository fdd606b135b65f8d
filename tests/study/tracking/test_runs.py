"""MLflow: runs found by tag and continued, closed truthfully, never deleted, nothing logged twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from features.errors import InputError
from study.specs import Cell, Job
from study.tracking import results, tags
from study.tracking import runs as tracking
from study.tracking.runs import EpochReport, PartTracker, TrialRun

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

    def open(self, name: str = "search", **run_tags: str) -> PartTracker:
        return tracking.open_part(
            home=self.home, uri=None, experiment=self.experiment, part=name, run_tags=run_tags, metric="val_rmse"
        )

    def runs(self, *, superseded: bool = False) -> dict[str, Any]:
        return {run.info.run_name: run for run in tracking.find_runs(self.client, self.id, superseded=superseded)}

    def series(self, run_id: str, key: str) -> list[tuple[int, float]]:
        return [(entry.step, entry.value) for entry in self.client.get_metric_history(run_id, key)]


def job(name: str, part: str = "search", ratio: float = 0.2) -> Job:
    return Job(
        part=part, cell=Cell(source="books", target="movies", ratio=ratio), row="music", model="lgcd", name=name, config={},
        seeds=(0, 1), feature_set="main", task_dir="task",
    )  # fmt: skip


def start(tracker: PartTracker, this: Job, **config: Any) -> None:
    tracker.start(this, config=config, document={"config": config, "seeds": [0, 1]}, fingerprint="f")


def run_of(tracker: PartTracker, trial: str) -> TrialRun:
    """The one run of a trial."""
    (run,) = tracker.runs[trial]
    return run


def epoch(number: int, value: float) -> EpochReport:
    return EpochReport(epoch=number, metrics={"val_rmse": value}, final=False, artifacts={}, time_ms=1000 + number)


def final(value: float, **artifacts: str | bytes) -> EpochReport:
    metrics = {"val_rmse": value, "val_rmse/seed_0": value}
    return EpochReport(epoch=9, metrics=metrics, final=True, artifacts=artifacts, time_ms=2000)


def test_a_finished_trial_has_all_that_the_ui_needs(part: Part, tmp_path: Path) -> None:
    tracker = part.open(**{tags.COMMIT: "abc"})
    tracker.start_part()
    start(tracker, job("0000"), lr=1e-5, side=True)
    tracker.report("search/books->movies@0.2/music/0000", [epoch(1, 1.5), epoch(2, 1.25), final(1.125)])
    tracker.finish(
        "search/books->movies@0.2/music/0000", final(1.125, **{"per_user.csv": "seed,user\n", "raw.bin": b"\x00\xff"})
    )
    tracker.end_part("FINISHED")
    runs = part.runs()
    assert set(runs) == {"search", "books->movies@0.2 search music 0000"}
    run, parent = runs["books->movies@0.2 search music 0000"], runs["search"]
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    run_id = run.info.run_id
    expected = {
        "study.part": "search",
        "study.trial": "search/books->movies@0.2/music/0000",
        "study.cell": "books->movies@0.2",
        "study.task": "books->movies",
        "study.ratio": "0.2",
        "study.row": "music",
        "study.model": "lgcd",
        "study.commit": "abc",
        "study.fingerprint": "f",
        "study.command": f"study rerun {run_id} --home {part.home}",
        "mlflow.parentRunId": parent.info.run_id,
    }
    assert expected.items() <= run.data.tags.items()
    assert run.data.params == {
        "lr": "1e-05", "side": "True", "task": "books->movies", "source": "books", "target": "movies", "ratio": "0.2",
        "row": "music", "model": "lgcd", "seeds": "0,1", "feature_set": "main",
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
    ("uri", "address"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("postgresql://me:secret@db:5432/mlflow?a=1&b=2", "'postgresql://me@db:5432/mlflow?a=1&b=2'"),
    ],
)
def test_the_command_names_the_server(part: Part, uri: str, address: str) -> None:
    tracker = PartTracker(
        client=part.client,
        experiment_id=part.id,
        part="search",
        run_tags={},
        metric="val_rmse",
        home=Path("/h"),
        uri=uri,
    )
    tracker.start_part()
    start(tracker, job("0000"))
    run = part.runs()["books->movies@0.2 search music 0000"]
    assert run.data.tags[tags.COMMAND] == f"MLFLOW_TRACKING_URI={address} study rerun {run.info.run_id} --home /h"


def test_the_machine_is_that_of_the_process_that_trained(part: Part) -> None:
    tracker = part.open(**{tags.DEVICE: "the driver's", tags.COMMIT: "abc"})
    tracker.start_part()
    start(tracker, job("0000"))
    tracker.finish(job("0000").trial, replace(final(1.0), tags={tags.DEVICE: "H100"}))
    run_tags = part.runs()["books->movies@0.2 search music 0000"].data.tags
    assert (run_tags[tags.DEVICE], run_tags[tags.COMMIT]) == ("H100", "abc")


def test_variants_are_tagged(part: Part) -> None:
    for name, part_name, variant in (
        ("steps=10", "sweep:steps", "10"),
        ("wo_side", "ablate", "wo_side"),
        ("test", "score", None),
    ):
        tracker = part.open(part_name)
        tracker.start_part()
        start(tracker, job(name, part_name))
        tracker.end_part("KILLED")
        run = part.runs()[f"books->movies@0.2 {part_name} music {name}"]
        assert run.data.tags.get(tags.VARIANT) == variant


def test_a_failure_keeps_its_reason_and_is_continued(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    trial = job("0000").trial
    tracker.report(trial, [epoch(1, 1.5)])
    tracker.fail(trial, failure="trial", reason="ValueError: empty", detail="Traceback\nValueError: empty\n")
    tracker.end_part("FINISHED")
    again = part.open()
    run = run_of(again, trial)
    assert (run.status, run.failure, run.reason) == ("FAILED", "trial", "ValueError: empty")
    assert {file.path for file in part.client.list_artifacts(run.run_id)} == {"config.yaml", "error.txt"}
    again.start_part()
    again.resume(run)
    start(again, job("0000"))
    continued = part.client.get_run(run.run_id)
    assert continued.info.status == "RUNNING"
    assert tags.ERROR not in continued.data.tags
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
    assert run_of(tracker, job("0000").trial).status == "FINISHED"
    assert run_of(tracker, job("0001").trial).status == "KILLED"
    tracker.end_part("FINISHED")
    status = {name: run.info.status for name, run in part.runs().items()}
    assert status == {
        "search": "FINISHED",
        "books->movies@0.2 search music 0000": "FINISHED",
        "books->movies@0.2 search music 0001": "KILLED",
    }


def test_leaving_a_part_closes_its_runs_as_killed(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    tracker.report(job("0000").trial, [epoch(1, 1.5)])
    tracker.end_part("KILLED")
    runs = part.runs()
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    trial_run = runs["books->movies@0.2 search music 0000"]
    assert part.series(trial_run.info.run_id, "epoch/val_rmse") == [(1, 1.5)], "what was reported is kept"


def test_what_a_trial_cost_is_the_time_it_ran_and_not_the_time_between(part: Part) -> None:
    def stopped() -> float:
        """What the trial took by then."""
        tracker = part.open()
        tracker.start_part()
        for run in tracker.runs.get(job("0000").trial, []):
            tracker.resume(run)
        start(tracker, job("0000"))
        tracker.end_part("KILLED")
        return run_of(part.open(), job("0000").trial).spent

    assert 0 <= stopped() < 100
    part.client.set_tag(part.runs()["books->movies@0.2 search music 0000"].info.run_id, tags.SPENT, "1000")
    assert 1000 <= stopped() < 1100


def test_a_run_whose_driver_died_before_its_parameters_gets_them(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = part.open()
    dead.start_part()
    with monkeypatch.context() as patch:
        patch.setattr(dead, "_log", lambda *_, **__: None)
        start(dead, job("0000"), lr=0.5)
    begun = run_of(part.open(), job("0000").trial)
    assert (begun.params, begun.seeds) == ({}, ())
    tracker = part.open()
    tracker.resume(begun)
    tracker.start_part()
    start(tracker, job("0000"), lr=0.5)
    tracker.finish(job("0000").trial, final(1.0))
    (run,) = (run for name, run in part.runs().items() if name != "search")
    assert (run.info.run_id, run.data.params["lr"], run.data.params["seeds"]) == (begun.run_id, "0.5", "0,1")
    assert run.data.tags[tags.COMMAND].startswith(f"study rerun {run.info.run_id}")


def test_other_parts_are_left_alone(part: Part) -> None:
    search = part.open("search")
    search.start_part()
    start(search, job("0000"))
    assert part.open("score").runs == {}
    assert part.runs()["search"].info.status == "RUNNING"
    search.end_part("KILLED")


def test_a_superseded_run_stays_and_counts_again_when_it_is_restored(part: Part) -> None:
    tracker = part.open()
    tracker.start_part()
    start(tracker, job("0000"))
    tracker.finish(job("0000").trial, final(1.0))
    tracker.end_part("FINISHED")
    name = "books->movies@0.2 search music 0000"
    for mark in (tags.BEST, tags.PARETO):
        part.client.set_tag(part.runs()[name].info.run_id, mark, "true")
    again = part.open()
    run = run_of(again, job("0000").trial)
    again.supersede(run, "another plan")
    assert again.superseded == 1
    assert set(part.runs()) == {"search"}
    tagged = part.runs(superseded=True)[name]
    assert (tagged.info.run_id, tagged.info.lifecycle_stage, tagged.info.status) == (run.run_id, "active", "FINISHED")
    assert tagged.data.tags[tags.SUPERSEDED] == "another plan"
    assert not {tags.BEST, tags.PARETO} & tagged.data.tags.keys(), "what counts no more is not the best"
    third = part.open()
    assert run_of(third, job("0000").trial).superseded == "another plan"
    third.restore(run_of(third, job("0000").trial))
    assert part.runs()[name].info.run_id == run.run_id


def test_a_trial_may_have_several_runs_newest_first(part: Part) -> None:
    ids = []
    for _ in range(2):
        tracker = part.open()
        tracker.start_part()
        start(tracker, job("0000"))
        tracker.finish(job("0000").trial, final(1.0))
        ids.append(next(run.run_id for run in part.open().runs[job("0000").trial] if run.run_id not in ids))
    assert [run.run_id for run in part.open().runs[job("0000").trial]] == ids[::-1]


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
