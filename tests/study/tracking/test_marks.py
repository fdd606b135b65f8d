"""Which trials of a search are tagged: the best of each row and cell, and those on the front of several objectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from study.selection import pareto_front
from study.specs import Cell, Job, Objective
from study.tracking import runs as tracking
from study.tracking import tags
from study.tracking.marks import mark_best, mark_front
from study.tracking.runs import EpochReport
from trainables.interface import Selection

LOWEST, HIGHEST = Selection("val_rmse", "minimize"), Selection("val_rmse", "maximize")
BOTH = (Objective(metric="val_rmse", direction="minimize"), Objective(metric="val_mae", direction="minimize"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One SQLite store for the module: making its tables takes seconds. Each test has an experiment of its own."""
    return tmp_path_factory.mktemp("home")


class Search:
    """The part `search` of an experiment."""

    def __init__(self, home: Path, experiment: str) -> None:
        self.home, self.experiment = home, experiment
        self.client: Any = tracking.connect(tracking.default_uri(home))
        self.id = tracking.open_experiment(self.client, experiment, home / "artifacts")

    def open(self) -> tracking.PartTracker:
        return tracking.open_part(
            home=self.home, uri=None, experiment=self.experiment, part="search", run_tags={}, metric="val_rmse"
        )

    def finish(self, trials: Mapping[tuple[str, float, str], tuple[float, ...]]) -> None:
        """(row, ratio, name) -> RMSE and MAE of a trial that is finished now."""
        tracker = self.open()
        tracker.start_part()
        for (row, ratio, name), values in trials.items():
            job = Job(
                part="search", cell=Cell(source="books", target="movies", ratio=ratio), row=row, model=row, name=name,
                config={}, seeds=(0,), feature_set="main", task_dir="task",
            )  # fmt: skip
            metrics = dict(zip(("val_rmse", "val_mae"), values, strict=False))
            tracker.start(job, config={}, document={}, fingerprint="f")
            report = EpochReport(epoch=1, metrics=metrics, final=True, artifacts={}, time_ms=1)
            tracker.finish(job.trial, report)
        tracker.end_part("FINISHED")

    def tagged(self, tag: str) -> set[str]:
        """Trials that have a tag, without the name of the part."""
        runs = tracking.find_runs(self.client, self.id, superseded=True)
        return {run.data.tags[tags.TRIAL].partition("/")[2] for run in runs if tag in run.data.tags}

    def supersede(self, trial: str) -> None:
        tracker = self.open()
        (run,) = tracker.runs[f"search/{trial}"]
        tracker.supersede(run, "another plan")


@pytest.fixture
def search(home: Path, request: pytest.FixtureRequest) -> Search:
    return Search(home, request.node.name)


def test_one_best_trial_per_row_and_cell(search: Search) -> None:
    search.finish({
        ("music", 0.2, "0000"): (1.0,), ("music", 0.2, "0001"): (0.5,), ("music", 0.2, "0002"): (0.5,),
        ("music", 0.5, "0000"): (2.0,), ("cmf", 0.2, "0000"): (3.0,),
    })  # fmt: skip
    chosen = mark_best(search.client, search.id, LOWEST)
    assert set(chosen) == {("music", "books->movies@0.2"), ("music", "books->movies@0.5"), ("cmf", "books->movies@0.2")}
    others = {"books->movies@0.5/music/0000", "books->movies@0.2/cmf/0000"}
    assert search.tagged(tags.BEST) == {"books->movies@0.2/music/0001", *others}, "of equals the first by name"
    search.finish({("music", 0.2, "0003"): (0.25,), ("music", 0.2, "0004"): (float("nan"),)})
    mark_best(search.client, search.id, LOWEST)
    assert search.tagged(tags.BEST) == {"books->movies@0.2/music/0003", *others}
    mark_best(search.client, search.id, HIGHEST)
    assert search.tagged(tags.BEST) == {"books->movies@0.2/music/0000", *others}


def test_a_superseded_trial_is_never_the_best(search: Search) -> None:
    search.finish(
        {("music", 0.2, "0000"): (0.1, 0.1), ("music", 0.2, "0001"): (0.5, 0.5), ("cmf", 0.2, "0000"): (1.0, 1.0)}
    )
    mark_best(search.client, search.id, LOWEST)
    mark_front(search.client, search.id, BOTH)
    search.supersede("books->movies@0.2/music/0000")
    assert search.tagged(tags.BEST) == search.tagged(tags.PARETO) == {"books->movies@0.2/cmf/0000"}, "at once"
    search.supersede("books->movies@0.2/cmf/0000")
    chosen = mark_best(search.client, search.id, LOWEST)
    mark_front(search.client, search.id, BOTH)
    assert list(chosen) == [("music", "books->movies@0.2")]
    assert search.tagged(tags.BEST) == search.tagged(tags.PARETO) == {"books->movies@0.2/music/0001"}


def test_a_search_without_a_result_has_no_best(search: Search) -> None:
    assert mark_best(search.client, search.id, LOWEST) == {}


def test_runs_on_the_front_of_their_row_are_tagged(search: Search) -> None:
    search.finish({
        ("music", 0.2, "0000"): (1.0, 0.1), ("music", 0.2, "0001"): (0.5, 0.2), ("music", 0.2, "0002"): (1.1, 0.15),
        ("cmf", 0.2, "0000"): (9.0, 9.0),
    })  # fmt: skip
    mark_front(search.client, search.id, BOTH)
    cmf, music = "books->movies@0.2/cmf/0000", "books->movies@0.2/music"
    assert search.tagged(tags.PARETO) == {f"{music}/0000", f"{music}/0001", cmf}, "rows are no rivals on a front"
    search.finish({("music", 0.2, "0003"): (0.9, 0.05)})
    mark_front(search.client, search.id, BOTH)
    assert search.tagged(tags.PARETO) == {f"{music}/0001", f"{music}/0003", cmf}, "a better trial takes the tag away"
    (part,) = (run for run in tracking.find_runs(search.client, search.id) if tags.TRIAL not in run.data.tags)
    assert part.data.tags[tags.OBJECTIVES] == "val_rmse,val_mae"
    mark_front(search.client, search.id, ())
    assert search.tagged(tags.PARETO) == set(), "the plan has gone back to one objective"
    assert tags.OBJECTIVES not in search.client.get_run(part.info.run_id).data.tags


def test_the_pareto_front_is_that_of_optuna() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 7, 60):
        values = generator.integers(0, 12, size=(count, 2)).astype(float)
        study = optuna.create_study(directions=["minimize", "maximize"])
        study.add_trials([optuna.trial.create_trial(values=list(row)) for row in values])
        front = [number for number, on in enumerate(pareto_front(values.tolist(), [False, True])) if on]
        assert front == sorted(trial.number for trial in study.best_trials)
    assert pareto_front([], [False, True]) == []
