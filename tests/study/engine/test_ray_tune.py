"""The order in which jobs are handed out, and what ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest

from study.engine.ray_tune import JobSearcher
from study.specs import Cell, Job, trial_name
from study.tracking.runs import EpochReport


class Notes:
    """A ledger that only writes down; rows in `spent` have no budget left."""

    def __init__(self, limit: int = 100, spent: Collection[str] = ()) -> None:
        self.limit = limit
        self.spent = set(spent)
        self.started: list[str] = []
        self.closed: list[str] = []

    def start(self, job: Job) -> dict[str, Any]:
        self.started.append(f"{job.row}/{job.cell.ratio}/{job.name}")
        return {"name": job.name}

    def report(self, job: Job, epochs: Sequence[EpochReport]) -> bool:
        raise AssertionError("not called")

    def exhausted(self, row: str) -> bool:
        return row in self.spent or len(self.started) == self.limit

    def failed(self, job: Job, *, reason: str, detail: str) -> None:
        raise AssertionError("not called")

    def lost(self, job: Job, *, reason: str, detail: str) -> bool:
        raise AssertionError("not called")

    def close(self, job: Job) -> None:
        if job.name == "0002":
            raise OSError("the disk is full")
        self.closed.append(f"{job.row}/{job.cell.ratio}/{job.name}")


def jobs(cells: int, trials: int, rows: Sequence[str] = ("music",)) -> list[Job]:
    return [
        Job(
            part="search", cell=Cell(source="a", target="b", ratio=ratio), row=row, model="m", name=trial_name(number),
            config=None, seeds=(0,), feature_set="main", task_dir="task",
        )
        for row in rows
        for ratio in (0.2, 0.5, 0.8)[:cells]
        for number in range(trials)
    ]  # fmt: skip


def test_no_cell_waits_for_another() -> None:
    notes = Notes()
    searcher = JobSearcher(jobs(cells=3, trials=2), notes)
    assert searcher.suggest("t0") == {"payload": {"name": "0000"}}
    searcher.suggest("t1")
    searcher.suggest("t2")
    searcher.suggest("t3")
    assert notes.started == ["music/0.2/0000", "music/0.5/0000", "music/0.8/0000", "music/0.2/0001"]
    searcher.on_trial_complete("t1", result={})
    searcher.suggest("t4")
    searcher.suggest("t5")
    assert notes.started[4:] == ["music/0.5/0001", "music/0.8/0001"]
    assert notes.closed == ["music/0.5/0000"]
    assert searcher.suggest("t6") is None, "one whose process goes is handed out again"
    for number in (0, 2, 3, 4, 5):
        searcher.on_trial_complete(f"t{number}", result={})
    assert searcher.suggest("t6") == JobSearcher.FINISHED


def test_rows_take_turns_as_cells_do() -> None:
    notes = Notes()
    searcher = JobSearcher(jobs(cells=2, trials=2, rows=("music", "cmf")), notes)
    for number in range(4):
        searcher.suggest(f"t{number}")
    assert notes.started == ["music/0.2/0000", "music/0.5/0000", "cmf/0.2/0000", "cmf/0.5/0000"]
    searcher.on_trial_complete("t3", result={})
    searcher.suggest("t4")
    assert notes.started[4:] == ["cmf/0.5/0001"], "the row and cell that has fewest running"


def test_a_direction_waits_for_the_opposite_one_while_others_can_run() -> None:
    """Where one training serves both, the second finds what the first has left."""
    cells = [Cell(source="a", target="b", ratio=1.0), Cell(source="b", target="a", ratio=1.0)]
    todo = [replace(job, cell=cell) for job in jobs(cells=1, trials=2, rows=("sasrec", "cmf")) for cell in cells]
    notes, names = Notes(), list[str]()
    searcher = JobSearcher(todo, notes)

    def hand(trial_id: str) -> None:
        searcher.suggest(trial_id)
        job = searcher.job(trial_id)
        names.append(f"{job.row} {job.cell.task} {job.name}")

    hand("t0")
    hand("t1")
    for number in range(2):
        searcher.on_trial_complete(f"t{number}", result={})
        hand(f"t{number + 2}")
    assert names == ["sasrec a->b 0000", "cmf a->b 0000", "sasrec b->a 0000", "cmf b->a 0000"]
    hand("t4")
    assert names[4:] == ["sasrec a->b 0001"], "more workers than pairs: none is idle"


def test_nothing_starts_beyond_the_budget() -> None:
    searcher = JobSearcher(jobs(cells=2, trials=3), Notes(limit=4))
    assert [isinstance(searcher.suggest(f"t{number}"), dict) for number in range(6)] == [True] * 4 + [False] * 2
    assert searcher.suggest("t6") == JobSearcher.FINISHED


def test_a_row_whose_budget_is_spent_stops_and_the_others_go_on() -> None:
    notes = Notes()
    searcher = JobSearcher(jobs(cells=1, trials=3, rows=("music", "cmf")), notes)
    searcher.suggest("t0")
    searcher.suggest("t1")
    notes.spent.add("music")
    searcher.suggest("t2")
    searcher.suggest("t3")
    assert notes.started == ["music/0.2/0000", "cmf/0.2/0000", "cmf/0.2/0001", "cmf/0.2/0002"]
    assert searcher.suggest("t4") is None, "one of the row that goes on may come back"
    for number in (1, 2):
        searcher.on_trial_complete(f"t{number}", result={})
    notes.spent.add("cmf")
    assert searcher.suggest("t4") == JobSearcher.FINISHED


def test_a_broken_store_ends_the_search() -> None:
    notes = Notes()
    searcher = JobSearcher(jobs(cells=1, trials=5), notes)
    for number in range(3):
        searcher.suggest(f"t{number}")
    with pytest.raises(OSError, match="the disk is full"):
        searcher.on_trial_complete("t2", result={})
    assert isinstance(searcher.broken, OSError)
    assert searcher.suggest("t3") == JobSearcher.FINISHED
