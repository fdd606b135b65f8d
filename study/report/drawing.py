"""Draws the numbers of `study.report.figures`: one style, matplotlib's object interface, the same bytes each time.

Colours are Okabe and Ito's (distinct for colour-blind readers): a task has one colour, a ratio one marker and line style,
whatever the figure. Where a figure has several rows of the study, the subject keeps the task's colour and its rivals are
thin, dashed and grey, each with a marker of its own. Legends stand outside the axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from study.report.figures import Curves, Figure, History, Importance, Parallel, Sensitivity, Tradeoff
from study.report.figures.common import Palette, value_text
from study.report.figures.search import Trace
from study.report.figures.sensitivity import Line, Panel
from study.report.statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
DPI = 160  # of the PNGs
RIVALS = ("#4b5563", "#9ca3af", "#6b7280")
_GREY = "#6b7280"
_STYLE: Any = {  # matplotlib types its keys as literals
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#374151",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 3.4,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.wspace": 0.04,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "axes.formatter.useoffset": False,
    "svg.hashsalt": "study",
    "svg.fonttype": "path",
}


def save(figure: Figure, folder: Path) -> dict[str, Path]:
    """Write `<name>.png`, `<name>.svg` and the points as `<name>.csv`; return them by their ending."""
    paths = {ending: folder / f"{figure.head.name}.{ending}" for ending in ("png", "svg", "csv")}
    with _style():
        canvas = _draw(figure)
        canvas.draw_without_rendering()  # lays it out, once for both files: saving does it again, drawing all twice
        canvas.set_layout_engine("none")
        canvas.savefig(paths["png"], dpi=DPI, metadata={"Software": None})
        canvas.savefig(paths["svg"], metadata={"Date": None, "Creator": None})
    figure.points().to_csv(paths["csv"], index=False, lineterminator="\n")
    return paths


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def draw(figure: Figure) -> Canvas:
    """Return a matplotlib figure of the numbers, in the study's style."""
    with _style():
        return _draw(figure)


@singledispatch
def _draw(figure: Figure) -> Canvas:
    raise TypeError(f"no drawing for {type(figure).__name__}")


@_draw.register
def _sensitivity(figure: Sensitivity) -> Canvas:
    if len(figure.presets) > 1 and figure.parameter != figure.head.labels.ratio_field:
        return _presets(figure)
    if not figure.numeric:
        return _groups(figure)
    return _lines(figure) if len(figure.rows) == 1 else _lines_by_task(figure)


def _lines(figure: Sensitivity) -> Canvas:
    """Draw one panel per metric, one line per cell."""
    canvas = _canvas(figure, 5.2 * len(figure.panels), 4.6)
    palette = figure.head.palette
    over_cells = figure.parameter == figure.head.labels.ratio_field
    for axes, panel in zip(_row(canvas, len(figure.panels)), figure.panels, strict=True):
        looks = [
            {"color": _colour(palette, line.task), **(_nth(0) if line.ratio is None else _shape(palette, line.ratio))}
            for line in panel.lines
        ]
        _curves_over_values(axes, figure, panel, list(zip(panel.lines, looks, strict=True)))
        _mark(axes, figure, palette.tasks)
        axes.set_xlabel(figure.head.labels.label(figure.parameter))
        axes.set_ylabel(figure.head.labels.label(panel.metric))
    lines = figure.panels[0].lines
    if over_cells:
        named = [(line.task, _task(line.task), {"color": _colour(palette, line.task), **_nth(0)}) for line in lines]
        _legend(canvas, named, title=_bars(figure))
    else:
        cells = [(line.task, line.ratio) for line in lines if line.ratio is not None]
        _cell_legend(canvas, figure, cells, title=_bars(figure))
    return canvas


def _lines_by_task(figure: Sensitivity) -> Canvas:
    """Draw one column per task, one row per metric, one line per row of the study (and ratio)."""
    labels, palette = figure.head.labels, figure.head.palette
    tasks = _tasks_of(figure)
    series = list(dict.fromkeys((line.row, line.ratio) for panel in figure.panels for line in panel.lines))
    several = len({ratio for _, ratio in series}) > 1
    canvas = _canvas(figure, max(6.4, 4.6 * len(tasks)), 1.5 + 3.1 * len(figure.panels))
    grid = canvas.subplots(len(figure.panels), len(tasks), squeeze=False, sharey="row")
    for panel, axes_row in zip(figure.panels, grid, strict=True):
        for task, axes in zip(tasks, axes_row, strict=True):
            lines = [line for line in panel.lines if line.task == task]
            looks = [_series_look(figure, series, line.row, line.ratio, _colour(palette, task)) for line in lines]
            _curves_over_values(axes, figure, panel, list(zip(lines, looks, strict=True)))
            _mark(axes, figure, (task,))
        axes_row[0].set_ylabel(labels.label(panel.metric))
    for k, task in enumerate(tasks):
        grid[0, k].set_title(_task(task))
        grid[-1, k].set_xlabel(labels.label(figure.parameter))
    named = []
    for row, ratio in series:
        text = labels.row(row).name + (f", {labels.task_type.ratio} {ratio:.0%}" if several else "")
        named.append((row, text, _series_look(figure, series, row, ratio, COLOURS[-1])))
    _legend(canvas, named, title=_bars(figure))
    return canvas


def _presets(figure: Sensitivity) -> Canvas:
    """Draw the curves of all presets in one panel for each cell and metric, as percent of each one's own reference.

    Their levels can be far apart, and the margin is a share of the level, so it is one band for all. Columns are ratios, or
    tasks where there is one ratio.
    """
    labels, tasks = figure.head.labels, _tasks_of(figure)
    ratios = sorted({line.ratio for panel in figure.panels for line in panel.lines if line.ratio is not None})
    by_ratio = len(ratios) > 1
    columns: list[tuple[str, float]] = [(task, ratio) for task in tasks for ratio in ratios]
    rows = [(panel, task) for panel in figure.panels for task in (tasks if by_ratio else [""])]
    width = len(ratios) if by_ratio else len(tasks)
    canvas = _canvas(figure, max(6.4, 3.9 * width), 1.5 + 2.7 * len(rows))
    grid = canvas.subplots(len(rows), width, squeeze=False, sharey="row")
    for (panel, task), axes_row in zip(rows, grid, strict=True):
        cells = [cell for cell in columns if not by_ratio or cell[0] == task]
        for (of_task, ratio), axes in zip(cells, axes_row, strict=True):
            lines = [line for line in panel.lines if (line.task, line.ratio) == (of_task, ratio)]
            _preset_curves(axes, figure, [line for line in lines if line.row in figure.presets and line.x])
            _mark(axes, figure, (of_task,), _GREY)
            axes.set_title(labels.cell(of_task, ratio))
        name = labels.label(panel.metric).partition("\n")[0]
        axes_row[0].set_ylabel(f"{name}\n(% from the published best)")
    for axes in grid[-1]:
        axes.set_xlabel(labels.label(figure.parameter))
    named = [(row, _preset_text(figure, row), _preset_look(figure, row)) for row in figure.presets]
    _legend(canvas, named, title=f"{_bars(figure)} · band: margin")
    return canvas


def _preset_curves(axes: Axes, figure: Sensitivity, lines: Sequence[Line]) -> None:
    """Draw lines relative to their references, a little apart, over the margin that they share."""
    places = np.asarray(figure.values if figure.numeric else range(len(figure.values)), dtype=np.float64)
    position = np.log(places) if figure.log else places
    gap = float(np.diff(position).min()) if len(position) > 1 else 1.0
    margins = [line.margin / abs(line.reference) * 100 for line in lines if line.margin > 0]
    if margins:
        axes.axhspan(-max(margins), max(margins), color=_GREY, alpha=0.13, linewidth=0, zorder=0)
    axes.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
    for k, line in enumerate(lines):
        y = [_percent(interval, line.reference) for interval in line.y]
        x = position[[figure.values.index(value) for value in line.x]] + 0.12 * gap * (k - (len(lines) - 1) / 2)
        x = np.exp(x) if figure.log else x
        look = _preset_look(figure, line.row)
        if not figure.numeric:
            look["linestyle"] = ""
        _interval(axes, x, replace(line, y=tuple(y)), **look)
    published = {mark.low for mark in figure.marks} if not figure.numeric else set()
    texts = [value_text(value).replace("_", "\n") + ("\n★" if value in published else "") for value in figure.values]
    axes.set_xscale("log" if figure.log else "linear")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(places), texts)


def _percent(interval: Interval, reference: float) -> Interval:
    value, low, high = (100 * (end / reference - 1) for end in (interval.value, interval.low, interval.high))
    return Interval(value, low, high, interval.n)


def _preset_look(figure: Sensitivity, row: str) -> dict[str, Any]:
    """Return the look of a preset: its place among the figure's presets has one colour, marker and stroke."""
    place = figure.presets.index(row)
    colour = COLOURS[place % len(COLOURS)]
    face = {"markerfacecolor": colour if place == 0 else "white", "markeredgecolor": colour, "markeredgewidth": 1.4}
    return {"color": colour, "linewidth": 2.0, **face, **_nth(place)}


def _preset_text(figure: Sensitivity, row: str) -> str:
    """Return `paper: LGCD as printed (0.064 to 0.080)`: the preset, the row and its values at the published best."""
    known = figure.head.labels.rows[row]
    levels = [line.reference for line in figure.panels[0].lines if line.row == row and line.x]
    digits = figure.head.labels.task_type.digits
    span = f"{min(levels):.{digits}f}" + (f" to {max(levels):.{digits}f}" if len(levels) > 1 else "")
    return f"{known.preset}: {known.name} ({span})"


def _curves_over_values(
    axes: Axes, figure: Sensitivity, panel: Panel, lines: Sequence[tuple[Line, Mapping[str, Any]]]
) -> None:
    """Draw lines over the swept values, a little apart so that their intervals can be read."""
    values = np.asarray(figure.values, dtype=np.float64)
    position = np.log(values) if figure.log else values
    gap = float(np.diff(position).min()) if len(position) > 1 else 1.0
    half = max(1, len(lines) - 1) / 2
    for k, (line, look) in enumerate(lines):
        shift = 0.10 * gap * (k - (len(lines) - 1) / 2) / half
        x = np.asarray(line.x, dtype=np.float64)
        _interval(axes, np.exp(np.log(x) + shift) if figure.log else x + shift, line, **look)
    axes.set_xscale("log" if figure.log else "linear")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(values), [value_text(float(value)) for value in values])
    axes.set_ylim(panel.low, panel.high)


def _series_look(
    figure: Sensitivity, series: Sequence[tuple[str, float | None]], row: str, ratio: float | None, colour: str
) -> dict[str, Any]:  # fmt: skip
    """Return the look of a line: the subject's in the task's colour, its rivals' thin, dashed and grey."""
    place = series.index((row, ratio))
    if row == figure.head.labels.model:
        return {"color": colour, "linewidth": 2.4, "zorder": 4, **_nth(place)}
    marker, stroke = MARKERS[place % len(MARKERS)], STROKES[1 + place % (len(STROKES) - 1)]
    return {
        "color": RIVALS[place % len(RIVALS)], "linewidth": 1.1, "zorder": 3, "marker": marker, "linestyle": stroke,
    }  # fmt: skip


def _mark(axes: Axes, figure: Sensitivity, tasks: Sequence[str], ink: str = "") -> None:
    """Draw the published optimum of these tasks: a dashed line or a band, in `ink`, else in the colour of its task."""
    for mark in figure.marks:
        marked = [task for task in mark.tasks if task in figure.head.palette.tasks]
        if not isinstance(mark.low, float | int) or not isinstance(mark.high, float | int):
            continue
        if mark.tasks and not set(mark.tasks) & set(tasks):
            continue
        colour = ink or (_colour(figure.head.palette, marked[0]) if len(marked) == 1 else _GREY)
        if mark.low == mark.high:
            axes.axvline(mark.low, color=colour, linestyle=(0, (1, 2)), linewidth=2.2, alpha=0.8, zorder=1)
        else:
            axes.axvspan(mark.low, mark.high, color=colour, alpha=0.12, linewidth=0, zorder=0)


def _groups(figure: Sensitivity) -> Canvas:
    """Draw one column per task, one row per metric; groups of ratios and rows, in each one marker per category.

    Where there is one group, x holds the categories themselves.
    """
    labels, palette = figure.head.labels, figure.head.palette
    groups = sorted(
        {(line.ratio, line.row) for panel in figure.panels for line in panel.lines},
        key=lambda group: (group[0] or 0.0, figure.rows.index(group[1])),
    )
    tasks = _tasks_of(figure)
    canvas = _canvas(figure, max(5.6, 3.9 * len(tasks)), 1.3 + 3.0 * len(figure.panels))
    grid = canvas.subplots(len(figure.panels), len(tasks), squeeze=False, sharey="row")
    for panel, axes_row in zip(figure.panels, grid, strict=True):
        for task, axes in zip(tasks, axes_row, strict=True):
            lines, colour = [line for line in panel.lines if line.task == task], _colour(palette, task)
            if len(groups) > 1:
                _group(axes, figure, panel, lines, groups, colour)
            else:
                _categories(axes, figure, panel, lines, colour)
        axes_row[0].set_ylabel(labels.label(panel.metric))
    for k, task in enumerate(tasks):
        grid[0, k].set_title(_task(task))
        by_ratio = len(groups) > 1 and len(figure.rows) == 1
        by_row = "" if len(figure.rows) > 1 else labels.label(figure.parameter)
        grid[-1, k].set_xlabel(labels.label(labels.ratio_field) if by_ratio else by_row)
    if len(groups) == 1:
        canvas.legend(handles=[Line2D([], [], color=_GREY, label=_bars(figure))], loc="outside lower center")
        return canvas
    best = {mark.low for mark in figure.marks}
    handles = [
        Line2D([], [], color=_GREY, linestyle="", label=f"{value} ★" if value in best else value, **_category(k, _GREY))
        for k, value in enumerate(figure.values)
    ]
    title = f"{labels.label(figure.parameter)} ({_bars(figure)})"
    canvas.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), title=title, handlelength=1.2
    )
    return canvas


def _group(
    axes: Axes,
    figure: Sensitivity,
    panel: Panel,
    lines: Sequence[Line],
    groups: Sequence[tuple[float | None, str]],
    colour: str,
) -> None:
    """Draw each group of a task in its column; groups are those of all tasks, so that columns can be compared."""
    width = 0.6 / max(1, len(figure.values) - 1)
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            column = groups.index((line.ratio, line.row))
            at = column + (figure.values.index(x) - (len(figure.values) - 1) / 2) * width
            axes.vlines(at, y.low, y.high, color=colour, linewidth=1.4, alpha=0.7)
            axes.plot([at], [y.value], linestyle="", color=colour, **_category(figure.values.index(x), colour))
    for g in range(1, len(groups)):
        axes.axvline(g - 0.5, color="#d1d5db", linewidth=0.8)
    axes.grid(False, axis="x")
    axes.set_xticks(range(len(groups)), [_group_text(figure, ratio, row) for ratio, row in groups])
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(panel.low, panel.high))


def _group_text(figure: Sensitivity, ratio: float | None, row: str) -> str:
    """Return `20%`, with the row's name above it where there are several."""
    return f"{figure.head.labels.row(row).name}\n{ratio:.0%}" if len(figure.rows) > 1 else f"{ratio:.0%}"


def _tasks_of(figure: Sensitivity) -> list[str]:
    return [task for task in figure.head.palette.tasks if any(line.task == task for line in figure.panels[0].lines)]


def _categories(axes: Axes, figure: Sensitivity, panel: Panel, lines: Sequence[Line], colour: str) -> None:
    """Draw one marker per category, hollow but for the published best."""
    published = {mark.low for mark in figure.marks}
    for line in lines:
        at = [figure.values.index(x) for x in line.x]
        axes.vlines(at, [y.low for y in line.y], [y.high for y in line.y], color=colour, linewidth=1.6, alpha=0.7)
        for x, y in zip(at, line.y, strict=True):
            face = colour if not published or figure.values[x] in published else "white"
            axes.plot([x], [y.value], "o", color=colour, markerfacecolor=face, markersize=8, markeredgewidth=1.6)
    axes.grid(False, axis="x")
    names = [str(value).replace("_", "\n") for value in figure.values]
    stars = [f"{name}\n★" if value in published else name for name, value in zip(names, figure.values, strict=True)]
    axes.set_xticks(range(len(names)), stars)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(panel.low, panel.high))


@_draw.register
def _importance(figure: Importance) -> Canvas:
    palette = figure.head.palette
    canvas = _canvas(figure, 8.0, 1.9 + 0.5 * len(figure.parameters))
    axes = canvas.subplots()
    rows = np.arange(len(figure.parameters))
    axes.barh(rows, figure.means, height=0.62, color="#e5e7eb", zorder=1)
    spread = np.linspace(-0.2, 0.2, len(figure.cells)) if len(figure.cells) > 1 else np.zeros(1)
    for cell, shift in zip(figure.cells, spread, strict=True):
        shares = [cell.shares.get(name, np.nan) for name in figure.parameters]
        style = {**_shape(palette, cell.ratio), "linestyle": ""}
        axes.plot(
            shares, rows + shift, color=_colour(palette, cell.task), markeredgecolor="white", markersize=7, **style
        )
    axes.set_yticks(rows, [figure.head.labels.label(name) for name in figure.parameters])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    trials = sorted({cell.trials for cell in figure.cells})
    count = f"{trials[0]}" if len(trials) == 1 else f"{trials[0]} to {trials[-1]}"
    axes.set_xlim(0, None)
    axes.set_xlabel(f"Importance (share, PED-ANOVA; {count} trials per cell; bar: mean of the cells)")
    _cell_legend(canvas, figure, [(cell.task, cell.ratio) for cell in figure.cells], lines=False)
    return canvas


@_draw.register
def _history(figure: History) -> Canvas:
    palette = figure.head.palette
    tasks = [task for task in palette.tasks if any(trace.task == task for trace in figure.traces)]
    canvas = _canvas(figure, max(6.0, 4.4 * len(tasks)), 4.4)
    for axes, task in zip(_row(canvas, len(tasks)), tasks, strict=True):
        for trace in (trace for trace in figure.traces if trace.task == task):
            _search(axes, trace, figure, figure.edge[task])
        axes.set_title(_task(task))
        axes.set(xlabel="Search trial", ylabel=figure.head.labels.label(figure.metric))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.5, figure.last + 0.5)
    ratios = [ratio for ratio in palette.ratios if any(trace.ratio == ratio for trace in figure.traces)]
    kind = figure.head.labels.task_type.ratio
    handles = [Line2D([], [], color=_GREY, label=f"{kind} {ratio:.0%}", **_shape(palette, ratio)) for ratio in ratios]
    stopped = " · crosses: stopped early, at their last epoch" if any(trace.stopped for trace in figure.traces) else ""
    title = f"points: trials · lines: best so far{stopped}"
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles), title=title)
    return canvas


def _search(axes: Axes, trace: Trace, figure: History, edge: float) -> None:
    palette = figure.head.palette
    colour, shape = _colour(palette, trace.task), _shape(palette, trace.ratio)
    within = np.maximum if figure.head.labels.higher else np.minimum
    axes.plot(
        trace.x, within(trace.y, edge), linestyle="", marker=shape["marker"], color=colour, alpha=0.4, markersize=4.5
    )
    if trace.stopped:
        x, values = zip(*trace.stopped, strict=True)
        axes.plot(x, within(values, edge), linestyle="", marker="x", color=colour, alpha=0.6, markersize=4.5)
    axes.step(trace.x, trace.best, where="post", color=colour, linestyle=shape["linestyle"])


@_draw.register
def _tradeoff(figure: Tradeoff) -> Canvas:
    """Draw one panel per task: every trial, and through those that nothing beats in both a line."""
    palette, label = figure.head.palette, figure.head.labels.label
    tasks = [task for task in palette.tasks if any(cloud.task == task for cloud in figure.clouds)]
    canvas = _canvas(figure, max(6.0, 4.6 * len(tasks)), 4.6)
    for axes, task in zip(_row(canvas, len(tasks)), tasks, strict=True):
        for cloud in (cloud for cloud in figure.clouds if cloud.task == task):
            colour, shape = _colour(palette, task), _shape(palette, cloud.ratio)
            axes.plot(cloud.x, cloud.y, color=colour, marker=shape["marker"], linestyle="", alpha=0.35, markersize=5)
            front = sorted((cloud.x[k], cloud.y[k]) for k in cloud.front)
            # Between two points of the front only the worse y of both is attained, at the better x.
            steps = "steps-pre" if figure.x_higher else "steps-post"
            axes.plot(*zip(*front, strict=True), color=colour, markeredgecolor="white", drawstyle=steps, **shape)
            if (k := cloud.selected) is not None:
                axes.plot([cloud.x[k]], [cloud.y[k]], "o", markersize=13, markerfacecolor="none", color="#000000")
        axes.set_title(_task(task))
        axes.set(xlabel=label(figure.x), ylabel=label(figure.y))
        axes.margins(0.08)
    ratios = [ratio for ratio in palette.ratios if any(cloud.ratio == ratio for cloud in figure.clouds)]
    kind = figure.head.labels.task_type.ratio
    handles = [Line2D([], [], color=_GREY, label=f"{kind} {ratio:.0%}", **_shape(palette, ratio)) for ratio in ratios]
    handles.append(Line2D([], [], color="#000000", marker="o", markersize=10, markerfacecolor="none", linestyle="",
                          label="selected"))  # fmt: skip
    canvas.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), title="line: trials none beats in both"
    )
    return canvas


@_draw.register
def _curves(figure: Curves) -> Canvas:
    palette = figure.head.palette
    canvas = _canvas(figure, 7.6, 4.6)
    axes = canvas.subplots()
    for trace in figure.traces:
        shape = _shape(palette, trace.ratio)
        every = max(1, len(trace.x) // 8)
        axes.plot(trace.x, trace.y, color=_colour(palette, trace.task), markevery=every, **shape)
    axes.set(xlabel="Epoch", ylabel=figure.head.labels.label(figure.metric))
    low, high = axes.get_ylim()
    if figure.head.labels.higher:
        axes.set_ylim(bottom=max(low, 0.98 * figure.edge))
    else:
        axes.set_ylim(top=min(high, 1.02 * figure.edge))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _cell_legend(canvas, figure, [(trace.task, trace.ratio) for trace in figure.traces])
    return canvas


@_draw.register
def _parallel(figure: Parallel) -> Canvas:
    """Draw dark lines for good trials; the selected one is drawn last, in vermilion."""
    canvas = _canvas(figure, max(7.0, 1.9 * len(figure.axes) + 2.2), 4.6)
    axes = canvas.subplots()
    x = np.arange(len(figure.axes))
    lines = [np.column_stack([x, positions]) for positions in figure.positions]
    values, higher = np.asarray(figure.values), figure.head.labels.higher
    worse = -values if higher else values
    order = np.argsort(-worse, kind="stable")  # the best is drawn last
    worst = float(np.quantile(worse, 0.9)) if len(values) > 1 else float(worse[0]) + 1e-9
    low, high = sorted((float(values[order[-1]]), -worst if higher else worst))
    norm = Normalize(low, high)
    colours, extend = ("viridis_r", "min") if higher else ("viridis", "max")
    axes.add_collection(
        LineCollection(
            [lines[i] for i in order], array=values[order], cmap=colours, norm=norm, alpha=0.75, linewidths=1.2
        )
    )
    best = lines[figure.best]
    axes.plot(best[:, 0], best[:, 1], color=COLOURS[1], linewidth=2.8, marker="o", zorder=4)
    for k, axis in enumerate(figure.axes):
        axes.axvline(k, color="#374151", linewidth=1.0, zorder=3)
        for position, text in axis.ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
            axes.annotate(
                text, (k, position), (5, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=box, zorder=5
            )
    label = figure.head.labels.label
    axes.set_xticks(x, [label(axis.name) + (" (log)" if axis.log else "") for axis in figure.axes])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set(xlim=(-0.15, len(x) - 1 + 0.45), ylim=(-0.06, 1.06))
    canvas.colorbar(ScalarMappable(norm, colours), ax=axes, label=label(figure.metric), extend=extend, pad=0.01)
    selected = f"selected: trial {figure.trials[figure.best]}, {figure.values[figure.best]:.4f}"
    canvas.legend(
        handles=[Line2D([], [], color=COLOURS[1], linewidth=2.8, marker="o", label=selected)],
        loc="outside lower center",
    )
    return canvas


def _canvas(figure: Figure, width: float, height: float) -> Canvas:
    canvas = Canvas(figsize=(width, height), layout="constrained")
    canvas.suptitle(figure.head.title)
    return canvas


def _row(canvas: Canvas, columns: int) -> list[Axes]:
    return list(canvas.subplots(1, columns, squeeze=False)[0])


def _interval(axes: Axes, x: Sequence[float] | np.ndarray[Any, Any], line: Line, **style: Any) -> None:
    style = {"zorder": 3, "markeredgecolor": "white", "markeredgewidth": 0.6, **style}
    axes.plot(x, [y.value for y in line.y], **style)
    axes.vlines(x, [y.low for y in line.y], [y.high for y in line.y], color=style["color"], linewidth=1.3, alpha=0.55)


def _cell_legend(
    canvas: Canvas, figure: Figure, cells: Sequence[tuple[str, float]], lines: bool = True, title: str | None = None
) -> None:
    """Draw the legend: one column per task, its ratios below each other."""
    palette = figure.head.palette
    named = [
        (task, figure.head.labels.cell(task, ratio), {"color": _colour(palette, task), **_shape(palette, ratio)})
        for task in palette.tasks
        for ratio in palette.ratios
        if (task, ratio) in set(cells)
    ]
    _legend(canvas, named, lines, title)


def _legend(
    canvas: Canvas, named: Sequence[tuple[str, str, Mapping[str, Any]]], lines: bool = True, title: str | None = None
) -> None:
    """Draw the entries (column, label, look), one column per task, or fewer where so many are wider than the figure."""
    handles = [
        Line2D([], [], label=label, **(look if lines else {**look, "linestyle": ""})) for _, label, look in named
    ]
    columns = max(1, min(3, len({column for column, _, _ in named})))
    length = None if lines else 1.2
    for count in range(columns, 0, -1):
        legend = canvas.legend(
            handles=handles, loc="outside lower center", ncols=count, title=title, handlelength=length
        )
        if count == 1 or legend.get_window_extent().width <= canvas.bbox.width:
            return
        legend.remove()


def _bars(figure: Sensitivity) -> str:
    """Say what the vertical bars are; most cells of a sweep have the same number of seeds."""
    numeric = any(isinstance(mark.low, float | int) for mark in figure.marks)
    marked = " · dotted or shaded: published optimum" if numeric else " · ★ published best" if figure.marks else ""
    seeds = sorted({y.n for panel in figure.panels for line in panel.lines for y in line.y} - {1})
    if not seeds:
        return "one seed: no intervals" + marked
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"bars: 95% t intervals over {count} seeds" + marked


def _colour(palette: Palette, task: str) -> str:
    return COLOURS[palette.tasks.index(task) % len(COLOURS)]


def _shape(palette: Palette, ratio: float) -> dict[str, Any]:
    return _nth(palette.ratios.index(ratio))


def _nth(k: int) -> dict[str, Any]:
    return {"marker": MARKERS[k % len(MARKERS)], "linestyle": STROKES[k % len(STROKES)]}


def _category(k: int, colour: str) -> dict[str, Any]:
    """Return the marker of the k-th category: every second one is hollow, so that neighbours differ twice."""
    face = colour if k % 2 == 0 else "white"
    return {"marker": MARKERS[k % len(MARKERS)], "markerfacecolor": face, "markersize": 7.5, "markeredgewidth": 1.5}


def _task(task: str) -> str:
    return task.replace("->", " → ")
