"""The live table of cells, by what a person reads on a terminal."""

from __future__ import annotations

import io
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from study.engine.run import CellProgress, Progress
from study.progress import LiveBars, ProgressDisplay, ProgressLines, cells_table, throughput
from trainables.interface import Selection

HALF = Progress(
    total=20, done=8, failed=1, running=2,
    cells={
        ("music", "a->b@0.2"): CellProgress(planned=10, ended=8, failed=1, running=2, best=0.75),
        ("emcdr", "a->b@0.2"): CellProgress(planned=10),
    },
)  # fmt: skip


def cells_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines() if "@" in line]


def rendered(table: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_says_done_running_failed_best_and_time_left() -> None:
    assert cells_of(rendered(cells_table(HALF, ended_before=4, seconds=1200))) == [
        ["a->b@0.2", "music", "8/10", "2", "1", "0.7500", "20 min"],
        ["a->b@0.2", "emcdr", "0/10", "0", "", "", "1 h 40 min"],
    ]  # fmt: skip
    assert [row[-1] for row in cells_of(rendered(cells_table(HALF, ended_before=8, seconds=5)))] == ["?", "?"]


def test_lines_in_progress_are_shown_where_not_all_fit_on_the_terminal() -> None:
    states = {
        "a": CellProgress(planned=2, ended=2),
        "b": CellProgress(planned=2),
        "c": CellProgress(planned=2, running=1),
    }
    cells = {(row, f"x->y@{number}"): state for number in range(3) for row, state in states.items()}
    progress = Progress(total=18, done=6, failed=0, running=3, cells=cells)
    table = cells_table(progress, ended_before=0, seconds=1, most=5)
    assert [line[:2] for line in cells_of(rendered(table))] == [
        ["x->y@0", "b"], ["x->y@0", "c"], ["x->y@1", "b"], ["x->y@1", "c"], ["x->y@2", "c"],
    ]  # fmt: skip
    assert table.caption == "and 3 lines that are finished, 1 that are waiting"
    assert len(cells_of(rendered(cells_table(progress, ended_before=0, seconds=1, most=9)))) == 9


def test_the_table_lives_below_the_bar_and_leaves_nothing() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        display = ProgressDisplay(bars)
        display.start("reading", 3)(2)
        assert bars.table is None
        display.show_jobs("search", HALF)
        bars.refresh()
        assert ["a->b@0.2", "music", "8/10", "2", "1", "0.7500", "?"] in cells_of(console.file.getvalue())
        display.start("drawing", 1)
        assert bars.table is None


def test_what_is_prepared_is_text_and_never_markup() -> None:
    """A plan's titles stand in it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        ProgressDisplay(bars).start("pretraining LGCD [wide] [/b]", 3)
        bars.refresh()
        assert "pretraining LGCD [wide] [/b]" in console.file.getvalue()


def test_speed_and_time_left_of_what_is_prepared() -> None:
    assert throughput(1200, 5200, 96_000, 40.0) == "30/s, 2,400 tokens/s, 2 min left"
    assert throughput(5, 10, 0, 10.0) == "0.5/s, < 1 min left"
    assert throughput(90_000, 0, 0, 10.0) == "9,000/s"
    assert throughput(2, 6, 0, 240.0) == "0.5/min, 8 min left"
    assert throughput(10, 10, 500, 10.0) == "1.0/s, 50 tokens/s"
    assert throughput(0, 10, 0, 5.0) == ""


def test_a_bar_of_an_extraction_shows_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 60.0])
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        display = ProgressDisplay(bars)
        monkeypatch.setattr("study.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
        advance = display.start("users of books: encoding", 5400)
        advance(1800, 120_000)
        bars.refresh()
        assert "1800/5400" in console.file.getvalue()
        assert "30/s, 2,000 tokens/s, 2 min left" in console.file.getvalue()


def test_the_time_that_workers_take_to_start_is_not_taken_for_slow_work() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        advance = ProgressDisplay(bars).start("users: encoding", 5400)
        advance(0, 0, 0.0)
        bars.refresh()
        assert "starting workers" in console.file.getvalue()
        advance(1800, 120_000, 60.0)  # a model loads for minutes, then a minute of work
        bars.refresh()
        assert "30/s, 2,000 tokens/s, 2 min left" in console.file.getvalue()


def test_nothing_is_drawn_where_nobody_watches() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        ProgressDisplay(bars).show_jobs("search", HALF)
    assert console.file.getvalue().strip() == ""


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        fixed = SimpleNamespace(monotonic=lambda: self.now, strftime=lambda form: "12:30")
        monkeypatch.setattr("study.progress.time", fixed)


def test_a_log_gets_a_line_at_each_change_of_part_and_each_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), list[str]()
    shown = ProgressLines(lines.append, Selection(metric="val_rmse", direction="minimize"))
    advance = shown.start("reading books", 0)
    clock.now = 30.0
    advance(1000)
    assert lines == []
    clock.now = 65.0
    advance(130_000)
    assert lines == ["12:30 reading books: 130,000, 2,000/s"]
    before = replace(HALF, done=4, cells={key: replace(cell, best=None) for key, cell in HALF.cells.items()})
    shown.show_jobs("search", before)
    assert lines[1:] == ["12:30 search: 4 of 20 trials, 2 running, 1 failed"]
    clock.now = 100.0
    shown.show_jobs("search", HALF)
    shown.tick()
    assert len(lines) == 2
    clock.now = 65.0 + 1200.0
    shown.tick()
    assert lines[2:] == [
        "12:30 search: 8 of 20 trials, 2 running, 1 failed, best val_rmse 0.7500 (music in a->b@0.2), 1 h 00 min left"
    ]
    shown.show_jobs("score", replace(HALF, total=8))
    assert len(lines) == 3, "nothing is left of it to watch"


def test_a_line_comes_while_trials_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written, lines = threading.Event(), list[str]()
    monkeypatch.setattr("study.progress.LINE_S", 0.0)
    shown = ProgressLines(lambda line: (lines.append(line), written.set())[1])
    shown.start("pretraining", 3)
    with shown.ticking():
        assert written.wait(600)
    assert lines[0].endswith(" pretraining: 0 of 3")
