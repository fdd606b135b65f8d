"""What is seen of a study while it runs: a bar, and a table of cells that lives on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from study.data.prepare import Told
    from study.engine.run import Progress as Jobs


class LiveBars(Progress):
    """Bars, and below them a table where there is one; nothing at all where no person watches."""

    table: Table | None = None

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
        )  # fmt: skip
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws, several times a second."""
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


def cells_table(progress: Jobs, ended_before: int, seconds: float) -> Table:
    """A row a cell. The time left assumes that trials go on ending as they did in the `seconds` since `ended_before`."""
    table = Table("cell", "done", "running", "failed", "best so far", "time left")
    ended = progress.done - ended_before
    for cell, (planned, done, failed) in progress.cells.items():
        left = (planned - done) * len(progress.cells) * seconds / ended if ended > 0 else None
        best = progress.best.get(cell)
        table.add_row(
            cell, f"{done}/{planned}", str(progress.running.get(cell, 0)), str(failed) if failed else "",
            "" if best is None else f"{best:.4f}", _duration(left) if planned > done else "",
        )  # fmt: skip
    return table


def speed_of(done: int, size: int, tokens: int, seconds: float) -> str:
    """`34/s, 2,100 tokens/s, 2 min left`; of a size of 0, which is unknown, no time left."""
    if not done or not seconds:
        return ""
    rates = [f"{done / seconds:,.0f}/s" if done >= 10 * seconds else f"{done / seconds:.1f}/s"]
    rates += [f"{tokens / seconds:,.0f} tokens/s"] if tokens else []
    left = [f"{_duration((size - done) * seconds / done)} left"] if size > done else []
    return ", ".join([*rates, *left])


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


class Watcher:
    """Draws what a study says of its progress."""

    def __init__(self, bars: LiveBars) -> None:
        self._bars = bars
        self._current: tuple[str, TaskID] | None = None
        self._began = (0, 0.0)

    def work(self, what: str, size: int) -> Told:
        """A bar for something that is prepared, with its speed and the time left."""
        task, began = self._task(what, size or None), time.monotonic()

        def told(done: int, tokens: int = 0, seconds: float | None = None, /) -> None:
            """Nodes and models take minutes to start, which says nothing of the time left: workers count their own."""
            speed = speed_of(done, size, tokens, time.monotonic() - began if seconds is None else seconds)
            self._bars.update(task, completed=done, speed="starting workers" if seconds == done == 0 else speed)

        return told

    def jobs(self, part: str, progress: Jobs) -> None:
        """The bar and the table of a part's trials."""
        now = time.monotonic()
        fresh = self._current is None or self._current[0] != part
        task = self._task(part, progress.total)
        if fresh or progress.done < self._began[0]:
            self._began = (progress.done, now)
        ended, since = self._began
        self._bars.table = cells_table(progress, ended, now - since)
        self._bars.update(task, completed=progress.done, total=progress.total)

    def _task(self, name: str, total: int | None) -> TaskID:
        if self._current is None or self._current[0] != name:
            if self._current is not None:
                self._bars.remove_task(self._current[1])
            self._bars.table = None
            self._current = (name, self._bars.add_task(name, total=total, speed=""))
        return self._current[1]
