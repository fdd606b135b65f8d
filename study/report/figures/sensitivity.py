"""Sweeps: a metric over the values of one parameter, everything else fixed; or over the ratio of the cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from study.labels import Labels, in_group
from study.papers.reader import Claim, Optimum, Order
from study.report.claims.margins import KEPT, mean_improvement
from study.report.figures.common import Head, axis_values, is_log, palette_of, titled, value_text
from study.report.statistics import Interval, seed_interval
from study.tracking.results import MissingError, Results, compared_on, per_seed
from trainables.interface import Figure as Look

_CUT = 0.75  # an interval may stretch an axis by this share of what else it shows, at each end


@dataclass(frozen=True)
class Line:
    """A row of the study in a cell: a value with its interval at each x, ascending or in the order of the categories."""

    row: str
    cell: str
    """Empty in a sweep of the ratio, whose lines run over cells."""
    task: str
    ratio: float | None
    """None in a sweep of the ratio."""
    x: tuple[float | str, ...]
    y: tuple[Interval, ...]
    reference: float = math.nan
    """Of the paper's model: its value where the paper has the optimum (a mean of several), else that of all values."""
    margin: float = math.nan
    """Smallest difference to it that would still make the claim of an optimum true; NaN: the paper claims none."""


@dataclass(frozen=True)
class Panel:
    """One metric; `low` and `high` end the axis, which wide intervals may leave."""

    metric: str
    lines: tuple[Line, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Mark:
    """Where the paper says that the best value is."""

    tasks: tuple[str, ...]
    """Empty: all."""
    low: float | str
    high: float | str
    place: str

    def holds(self, value: float | str) -> bool:
        """Return whether a value is among the published best."""
        if isinstance(value, str) or isinstance(self.low, str) or isinstance(self.high, str):
            return value == self.low
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Sensitivity:
    """A sweep of one parameter, or of the ratio."""

    head: Head
    parameter: str
    values: tuple[float | str, ...]
    log: bool
    panels: tuple[Panel, ...]
    marks: tuple[Mark, ...]

    @property
    def presets(self) -> tuple[str, ...]:
        """The rows that have a line and are the subject's model, each with a preset of its own."""
        rows = self.head.labels.rows
        return tuple(row for row in self.rows if row in rows and rows[row].model == self.head.labels.model)

    @property
    def numeric(self) -> bool:
        """Whether x is a number (lines) or a category (groups)."""
        return all(isinstance(value, float) for value in self.values)

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of the study that have a line, the subject first."""
        return tuple(dict.fromkeys(line.row for panel in self.panels for line in panel.lines))

    def points(self) -> pd.DataFrame:
        """Return one line per metric, cell, row and value."""
        points = [
            (panel.metric, line.cell, line.row, line.task, line.ratio, x, y.value, y.low, y.high, y.n)
            for panel in self.panels
            for line in panel.lines
            for x, y in zip(line.x, line.y, strict=True)
        ]
        columns = ["metric", "cell", "row", "task", "ratio", self.parameter, "mean", "low", "high", "seeds"]
        frame = pd.DataFrame(points, columns=columns)
        over_cells = self.parameter == self.head.labels.ratio_field
        return frame.drop(columns=["cell", "ratio"]) if over_cells else frame


def sensitivity(results: Results, parameter: str) -> Sensitivity:
    """Return the sweep of `parameter`, as the subject's FIGURES show it: a line for each cell and row of the study."""
    labels = results.labels
    look = labels.figures.get(parameter, Look())
    trials, values = _swept(results, parameter, look)
    groups = labels.task_type.groups
    metrics = look.metrics or tuple(f"val_{in_group(m, g)}" for m in labels.task_type.sensitivity for g in groups)
    split = compared_on(trial for _, trial in trials.iterrows())
    if split == "test":
        metrics = tuple(f"test_{metric.removeprefix('val_')}" for metric in metrics)
    marks = _marks(labels, f"sweep:{parameter}", values)
    drawn = [_panel(results, trials, metric, values, marks) for metric in metrics]
    panels = tuple(panel for panel in drawn if any(line.x for line in panel.lines))
    if not panels:
        raise MissingError(f"sweep of {parameter}: no finished run logged {' or '.join(metrics)}; run `study sweep`")
    title = look.title or f"Sensitivity to {parameter}"
    over = "row" if parameter == labels.ratio_field else f"{labels.task_type.ratio} ratio"
    alt = f"{title}: one line per task and {over} over {', '.join(value_text(value) for value in values)}."
    notes = (*_lacking(results, trials, values, parameter), *_reading(panels, marks, split))
    head = Head(
        labels, look.name or f"sensitivity_{parameter}", titled(title, results), alt, palette_of(results), notes
    )  # fmt: skip
    return Sensitivity(head, parameter, values, is_log(values), panels, marks)


def _reading(panels: Sequence[Panel], marks: Sequence[Mark], split: str) -> Iterator[str]:
    """Yield how the panels are to be read: cut intervals, marks, and the margin, a band where rows are compared."""
    if any(_is_cut(panel) for panel in panels):
        yield "Intervals wider than the axis are cut at its edge; the CSV holds their ends."
    yield from map(_mark_text, marks)
    shares = [line.margin / line.reference for panel in panels for line in panel.lines if line.margin > 0]
    if shares:
        together = len({line.row for line in panels[0].lines if line.margin > 0}) > 1
        share = f"{min(shares):.1%}" + (f" to {max(shares):.1%}" if max(shares) > 1.01 * min(shares) else "")
        shown = "Band: the margin of the claims" if together else "Each axis shows at least the margin of the claims"
        yield f"{shown}, {share} of the value at the published optimum. Compared on {split} users."


def _swept(results: Results, parameter: str, look: Look) -> tuple[pd.DataFrame, tuple[float | str, ...]]:
    """Return the finished trials of a sweep with their value in the column `x`, and all values in order."""
    part = f"sweep:{parameter}"
    over_cells = parameter == results.labels.ratio_field
    trials = results.finished(part)
    column = "ratio" if over_cells else f"params.{parameter}"
    if trials.empty or column not in trials.columns:
        raise MissingError(f"sweep of {parameter}: no finished run of part {part}; run `study sweep`")
    texts = trials[column].astype(str)
    values = axis_values(list(texts.unique()), look.order)
    numeric = all(isinstance(value, float) for value in values)
    trials = trials.assign(x=[float(text) if numeric else text for text in texts])
    return (trials.assign(cell="") if over_cells else trials), values


def _panel(
    results: Results, trials: pd.DataFrame, metric: str, values: Sequence[float | str], marks: Sequence[Mark]
) -> Panel:  # fmt: skip
    """Return one metric of all lines: row by row, the subject first, then by cell and task."""
    order = {row: k for k, row in enumerate(results.rows_in(str(trials["part"].iloc[0])))}
    ranked = trials.assign(_rank=trials["row"].map(order))
    lines = []
    for (_, row, cell, task), line in ranked.groupby(["_rank", "row", "cell", "task"], sort=True):
        at = {trial["x"]: seed_interval(seeds) for _, trial in line.iterrows() if (seeds := per_seed(trial, metric))}
        x = tuple(value for value in values if value in at)
        ratio = float(line.iloc[0]["ratio"]) if cell else None
        line_of = Line(str(row), str(cell), str(task), ratio, x, tuple(at[value] for value in x))
        lines.append(_held_against(results.labels, line_of, metric, marks, set(trials["task"])))
    return Panel(metric, tuple(lines), *_limits(lines))


def _held_against(
    labels: Labels, line: Line, metric: str, marks: Sequence[Mark], tasks: set[str]
) -> Line:  # fmt: skip
    """Return a line of the subject's model with its value at the published optimum and the margin around it."""
    known = labels.rows.get(line.row)
    if known is None or known.model != labels.model or not line.x:
        return line
    mark = next((mark for mark in marks if not mark.tasks or line.task in mark.tasks), None)
    at = [y.value for x, y in zip(line.x, line.y, strict=True) if mark is not None and mark.holds(x)]
    reference = sum(at or [y.value for y in line.y]) / len(at or line.y)
    name = metric.partition("_")[2]
    names = [known.name for known in labels.task_type.metrics if name in _in_groups(labels, known.name)]
    spoken_of = set(mark.tasks) & tasks if mark is not None and mark.tasks else tasks
    share = mean_improvement(labels, names[0], spoken_of) if at and names else None
    return replace(line, reference=reference, margin=KEPT * share * abs(reference) if share else math.nan)


def _in_groups(labels: Labels, metric: str) -> list[str]:
    return [metric, *(in_group(metric, group) for group in labels.task_type.groups)]


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the ends of the axis: all means, the margin on both sides of them, and their intervals up to `_CUT`.

    So differences that the paper's claims would not call any look small, and wide intervals do not flatten the means.
    """
    intervals = [interval for line in lines for interval in line.y]
    if not intervals:
        return 0.0, 1.0
    margins = [line for line in lines if line.margin > 0]
    low = min([*(i.value for i in intervals), *(line.reference - line.margin for line in margins)])
    high = max([*(i.value for i in intervals), *(line.reference + line.margin for line in margins)])
    ends = [end for i in intervals for end in (i.low, i.high) if math.isfinite(end)]
    room = _CUT * (high - low) if high > low else math.inf
    bottom = max(min([low, *ends]), low - room)
    top = min(max([high, *ends]), high + room)
    pad = 0.06 * (top - bottom) or 0.05
    return bottom - pad, top + pad


def _is_cut(panel: Panel) -> bool:
    return any(i.low < panel.low or i.high > panel.high for line in panel.lines for i in line.y)


def _lacking(
    results: Results, trials: pd.DataFrame, values: Sequence[float | str], parameter: str
) -> Iterator[str]:  # fmt: skip
    """Yield which expected lines lack some values of the sweep, and which all: every row of it in every cell or task."""
    over_cells = parameter == results.labels.ratio_field
    column = "task" if over_cells else "cell"
    places = sorted(trials["task"].unique()) if over_cells else results.cells_of_plan()
    rows = results.rows_in(f"sweep:{parameter}")
    absent = []
    for row in rows:
        for place in places:
            there = set(trials[(trials["row"] == row) & (trials[column] == place)]["x"])
            name = f"{place}, {results.labels.row(row).name}" if len(rows) > 1 else str(place)
            lacks = [value_text(value) for value in values if value not in there]
            if not there:
                absent.append(name)
            elif lacks:
                yield f"{name}: {parameter} = {', '.join(lacks)} missing."
    if absent:
        yield f"No finished run in this sweep: {'; '.join(absent) if len(rows) > 1 else ', '.join(absent)}."


def _marks(labels: Labels, part: str, values: Sequence[float | str]) -> tuple[Mark, ...]:
    """Return the published optima of a sweep: of a number its range, of a category the one that is best of all."""
    dataset = labels.subject_published.dataset if labels.subject_published else ""
    marks: dict[tuple[tuple[str, ...], float | str, float | str], Mark] = {}
    for claim in labels.paper.claims if labels.paper else ():
        best = _best_value(claim, values)
        if claim.part == part and best is not None and (not claim.dataset or claim.dataset == dataset):
            marks.setdefault((claim.tasks, *best), Mark(claim.tasks, *best, claim.place))
    return tuple(marks.values())


def _best_value(claim: Claim, values: Sequence[float | str]) -> tuple[float | str, float | str] | None:
    """Return the range of values that a claim calls the best; None where it names none."""
    form = claim.form
    if isinstance(form, Optimum):
        return form.low, form.high
    if isinstance(form, Order) and len(form.levels[0]) == 1 and form.levels[0][0] in values:
        return form.levels[0][0], form.levels[0][0]
    return None


def _mark_text(mark: Mark) -> str:
    span = value_text(mark.low) if mark.low == mark.high else f"{value_text(mark.low)} to {value_text(mark.high)}"
    tasks = ", ".join(task.replace("->", " → ") for task in mark.tasks) or "every task"
    return f"Published optimum: {span} ({tasks}; {mark.place})."
