"""Progress callbacks of a study, and what they show: a bar and a live table on a terminal, a line each minute elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from study.engine.run import Progress as JobProgress
    from trainables.interface import Selection


LINE_S = 60.0
"""Where the output is no terminal, a line is written this often."""
_FRAME = 8  # lines of the terminal that the bar and the table's frame take


class Advance(Protocol):
    """Takes how much is done in all; where they are known, also how many tokens that were and the workers' seconds."""

    def __call__(self, done: int, tokens: int = 0, seconds: float | None = None, /) -> None: ...


StartProgress = Callable[[str, int], Advance]
"""(what is being done, its size or 0 where that is unknown) -> a callback that takes how much of it is done."""


def no_progress(what: str, size: int) -> Advance:
    """Start a progress that shows nothing."""
    return lambda done, tokens=0, seconds=None: None


def advance_by(advance: Advance) -> Callable[[int], None]:
    """Return a callback that takes what was done since its last call."""
    done = 0

    def advance_more(more: int) -> None:
        nonlocal done
        done += more
        advance(done)

    return advance_more


def phase_progress(start_progress: StartProgress, what: str) -> Callable[..., None]:
    """Return a callback that takes (phase, done, total[, tokens, seconds]) and shows one bar after the other."""
    bars: dict[str, Advance] = {}

    def advance(phase: str, done: int, total: int, *counts: Any) -> None:
        if phase not in bars:
            bars[phase] = start_progress(f"{what}: {phase}", total)
        bars[phase](done, *counts)

    return advance


class LiveBars(Progress):
    """Bars, and below them a table where there is one; nothing at all where the output is no terminal."""

    table: Table | None = None

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
        )  # fmt: skip
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what rich draws, several times a second."""
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


def cells_table(progress: JobProgress, ended_before: int, seconds: float, most: int | None = None) -> Table:
    """Return a table with a line for each row and cell; of more than `most`, those in progress first.

    The time left assumes that trials go on ending as they did in the `seconds` since `ended_before` of them had ended.
    """
    table = Table("cell", "row", "done", "running", "failed", "best so far", "time left")
    ended = progress.done - ended_before
    lines = _in_sight(progress, most)
    for row, cell in lines:
        part = progress.cells[row, cell]
        waiting = part.planned - part.ended
        left = waiting * len(progress.cells) * seconds / ended if ended > 0 else None
        table.add_row(
            cell, row, f"{part.ended}/{part.planned}", str(part.running), str(part.failed) if part.failed else "",
            "" if part.best is None else f"{part.best:.4f}", _duration(left) if waiting else "",
        )  # fmt: skip
    hidden = [part for key, part in progress.cells.items() if key not in lines]
    if hidden:
        finished = sum(part.ended == part.planned for part in hidden)
        table.caption = f"and {finished} lines that are finished, {len(hidden) - finished} that are waiting"
    return table


def _in_sight(progress: JobProgress, most: int | None) -> list[tuple[str, str]]:
    """Lines of the table: all, or of too many those that run, then those that wait, in their order."""
    keys = list(progress.cells)
    if most is None or len(keys) <= most:
        return keys

    def urgency(key: tuple[str, str]) -> int:
        part = progress.cells[key]
        return 0 if part.running else 1 if part.ended < part.planned else 2

    chosen = set(sorted(keys, key=urgency)[: max(most, 1)])
    return [key for key in keys if key in chosen]


def throughput(done: int, size: int, tokens: int, seconds: float) -> str:
    """Return `34/s, 2,100 tokens/s, 2 min left`; without the time left for a size of 0, which is unknown."""
    if not done or not seconds:
        return ""
    rate = done / seconds
    rates = [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.1f}/min"]
    rates += [f"{tokens / seconds:,.0f} tokens/s"] if tokens else []
    left = [f"{_duration((size - done) * seconds / done)} left"] if size > done else []
    return ", ".join([*rates, *left])


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


class ProgressDisplay:
    """Draws the progress of a study, one thing at a time."""

    def __init__(self, bars: LiveBars) -> None:
        self._bars = bars
        self._current: tuple[str, TaskID] | None = None
        self._part_began = (0, 0.0)  # trials that had ended, and the time

    def start(self, what: str, size: int) -> Advance:
        """Show a bar for something that is prepared, with its throughput and the time left; a `StartProgress`."""
        task, began = self._bar(what, size or None), time.monotonic()

        def advance(done: int, tokens: int = 0, seconds: float | None = None, /) -> None:
            # Nodes and models take minutes to start, which says nothing of the time left: workers count their own.
            speed = throughput(done, size, tokens, time.monotonic() - began if seconds is None else seconds)
            self._bars.update(task, completed=done, speed="starting workers" if seconds == done == 0 else speed)

        return advance

    def show_jobs(self, part: str, progress: JobProgress) -> None:
        """Show the bar and the table of a part's trials."""
        now = time.monotonic()
        fresh = self._current is None or self._current[0] != part
        task = self._bar(part, progress.total)
        if fresh or progress.done < self._part_began[0]:
            self._part_began = (progress.done, now)
        ended, began = self._part_began
        self._bars.table = cells_table(progress, ended, now - began, most=self._bars.console.height - _FRAME)
        self._bars.update(task, completed=progress.done, total=progress.total)

    def _bar(self, name: str, total: int | None) -> TaskID:
        if self._current is None or self._current[0] != name:
            if self._current is not None:
                self._bars.remove_task(self._current[1])
            self._bars.table = None
            self._current = (name, self._bars.add_task(name, total=total, speed=""))
        return self._current[1]


class ProgressLines:
    """Writes the progress of a study as plain lines, for logs: at each change of part, and every LINE_S seconds.

    What is prepared before the trials is often done in a second: it gets its first line when it takes LINE_S seconds.
    """

    def __init__(self, write: Callable[[str], None], selection: Selection | None = None) -> None:
        """`selection`: names the metric of the best value so far, and which way is better."""
        self._write = write
        self._selection = selection
        self._lock = threading.Lock()
        self._line: Callable[[float], str] | None = None  # the seconds since it began -> what stands in the line
        self._name = ""
        self._began = self._written = time.monotonic()
        self._ended_before = 0

    def start(self, what: str, size: int) -> Advance:
        """Take the beginning of something that is prepared; a `StartProgress`."""
        counts: tuple[int, int, float | None] = (0, 0, None)  # done, tokens, the workers' own seconds

        def line(seconds: float) -> str:
            done, tokens, working = counts
            speed = throughput(done, size, tokens, seconds if working is None else working)
            of_all = f"{done:,} of {size:,}" if size else f"{done:,}"
            return ", ".join(filter(None, [f"{what}: {of_all}", speed]))

        def advance(done: int, tokens: int = 0, seconds: float | None = None, /) -> None:
            nonlocal counts
            counts = (done, tokens, seconds)
            self.tick()

        self._begin(what, line)
        return advance

    def show_jobs(self, part: str, progress: JobProgress) -> None:
        """Take the state of a part's trials."""
        fresh = part != self._name
        if fresh:
            self._ended_before = progress.done
        self._begin(part, lambda seconds: self._jobs_line(part, progress, seconds))
        if fresh and progress.done < progress.total:
            self.tick(now=True)
        self.tick()

    def tick(self, *, now: bool = False) -> None:
        """Write the line of what is in progress when its time has come, or `now`."""
        with self._lock:
            clock = time.monotonic()
            if self._line is not None and (now or clock - self._written >= LINE_S):
                self._written = clock
                self._write(f"{time.strftime('%H:%M')} {self._line(clock - self._began)}")

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Look every second, for the time of the block, whether a line is due: trials may say nothing for long."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                self.tick()

        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _begin(self, name: str, line: Callable[[float], str]) -> None:
        with self._lock:
            if name != self._name:
                self._name, self._began = name, time.monotonic()
                self._written = self._began
            self._line = line

    def _jobs_line(self, part: str, progress: JobProgress, seconds: float) -> str:
        words = [f"{part}: {progress.done} of {progress.total} trials"]
        words += [f"{progress.running} running"] if progress.running else []
        words += [f"{progress.failed} failed"] if progress.failed else []
        values = [cell.best for cell in progress.cells.values() if cell.best is not None]
        if values and self._selection is not None:
            value = self._selection.best(values)
            (row, cell), *_ = (key for key, cell in progress.cells.items() if cell.best == value)
            words.append(f"best {self._selection.metric} {value:.4f} ({row} in {cell})")
        ended = progress.done - self._ended_before
        if ended > 0 and progress.done < progress.total:
            words.append(f"{_duration((progress.total - progress.done) * seconds / ended)} left")
        return ", ".join(words)
