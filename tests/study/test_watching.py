"""The live table of cells, by what a person reads on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from study.engine import Progress
from study.watching import LiveBars, Watcher, cells_table

HALF = Progress(
    total=20, done=8, failed=1, running={"a->b@0.2": 2}, best={"a->b@0.2": 0.75},
    cells={"a->b@0.2": (10, 8, 1), "a->b@0.5": (10, 0, 0)},
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
        ["a->b@0.2", "8/10", "2", "1", "0.7500", "20 min"], ["a->b@0.5", "0/10", "0", "", "", "1 h 40 min"],
    ]  # fmt: skip
    assert [row[-1] for row in cells_of(rendered(cells_table(HALF, ended_before=8, seconds=5)))] == ["?", "?"]


def test_the_table_lives_below_the_bar_and_leaves_nothing() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        watcher = Watcher(bars)
        watcher.work("reading", 3)(2)
        assert bars.table is None
        watcher.jobs("search", HALF)
        bars.refresh()
        assert ["a->b@0.2", "8/10", "2", "1", "0.7500", "?"] in cells_of(console.file.getvalue())
        watcher.work("drawing", 1)
        assert bars.table is None


def test_nothing_is_drawn_where_nobody_watches() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    assert isinstance(console.file, io.StringIO)
    with LiveBars(console) as bars:
        Watcher(bars).jobs("search", HALF)
    assert console.file.getvalue().strip() == ""
