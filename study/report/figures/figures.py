"""What each figure shows, as numbers: pure functions from `Results` to frozen values. `study.report.drawing` draws them.

Every figure has a file name, a title, one sentence for who cannot see it, notes (what is missing, what was cut) and its
points as a table. Functions raise MissingError where the store holds nothing to show. Sweeps and searches only ever saw
validation data, and so do their figures. Intervals are Student's t over the seeds, at 95%. Names, and which way is better,
are those of the study's labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from study.labels import Labels, in_group
from study.papers.reader import Optimum, Order
from study.report.statistics import Interval, seed_interval
from study.selection import best_per_cell
from study.specs import PREDICTOR, RATIO
from study.tracking.results import MissingError, Results, per_seed
from trainables import interface

MIN_TRIALS = 5  # fewer finished trials of a cell say nothing about importance
LOG_SPAN = 20  # positive values that span at least this factor are shown and modelled on a logarithmic axis
_CUT = 0.75  # an interval may stretch an axis by this share of the span of the means at each end


@dataclass(frozen=True)
class Palette:
    """All tasks and ratios of the study: a task has one colour and a ratio one marker, in every figure."""

    tasks: tuple[str, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Head:
    """What every figure carries beside its numbers."""

    labels: Labels
    name: str  # of its files
    title: str
    alt: str
    palette: Palette
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A cell, or a row over cells: a value with its interval at each x, ascending or in the order of the categories."""

    name: str  # of the cell; of a sweep of the ratio: model or predictor
    task: str
    ratio: float  # NaN in a sweep of the ratio
    x: tuple[float | str, ...]
    y: tuple[Interval, ...]


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

    tasks: tuple[str, ...]  # empty: all
    low: float | str
    high: float | str
    place: str


@dataclass(frozen=True)
class Sensitivity:
    """A sweep of one parameter, everything else fixed; or of the ratio, whose lines run over cells."""

    head: Head
    parameter: str
    values: tuple[float | str, ...]
    log: bool
    panels: tuple[Panel, ...]
    marks: tuple[Mark, ...]

    @property
    def numeric(self) -> bool:
        """Whether x is a number (lines) or a category (groups)."""
        return all(isinstance(value, float) for value in self.values)

    def points(self) -> pd.DataFrame:
        """One row per metric, cell and value."""
        rows = [
            (panel.metric, line.name, line.task, line.ratio, x, y.value, y.low, y.high, y.n)
            for panel in self.panels
            for line in panel.lines
            for x, y in zip(line.x, line.y, strict=True)
        ]
        columns = ["metric", "cell", "task", "cell_ratio", "x", "mean", "low", "high", "seeds"]
        frame = pd.DataFrame(rows, columns=columns).rename(columns={"x": self.parameter})
        if self.parameter == RATIO:
            return frame.drop(columns="cell_ratio").rename(columns={"cell": "row"})
        return frame.rename(columns={"cell_ratio": "ratio"})


@dataclass(frozen=True)
class CellImportance:
    """Share of each parameter in one cell, over its finished trials; the shares of a cell sum to 1."""

    cell: str
    task: str
    ratio: float
    trials: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Importance:
    """How much each searched parameter matters (PED-ANOVA), the most important first."""

    head: Head
    metric: str
    parameters: tuple[str, ...]
    means: tuple[float, ...]  # over the cells
    cells: tuple[CellImportance, ...]

    def points(self) -> pd.DataFrame:
        """One row per cell and parameter."""
        rows = [
            (cell.cell, cell.task, cell.ratio, cell.trials, name, cell.shares.get(name, math.nan))
            for cell in self.cells
            for name in self.parameters
        ]
        return pd.DataFrame(rows, columns=["cell", "task", "ratio", "trials", "parameter", "importance"])


@dataclass(frozen=True)
class Trace:
    """One cell's series: search trials in the order they were asked for, or epochs."""

    cell: str
    task: str
    ratio: float
    x: tuple[int, ...]
    y: tuple[float, ...]
    best: tuple[float, ...]  # best so far


@dataclass(frozen=True)
class History:
    """The search of every cell, trial by trial."""

    head: Head
    metric: str
    traces: tuple[Trace, ...]
    edge: Mapping[str, float]  # task -> the worse end of its axis; trials beyond it are drawn there

    def points(self) -> pd.DataFrame:
        """One row per cell and finished trial."""
        return _trace_points(self.traces, "trial", self.metric)


@dataclass(frozen=True)
class Curves:
    """Validation over the epochs of each cell's selected configuration."""

    head: Head
    metric: str
    traces: tuple[Trace, ...]
    edge: float  # the worse end of the axis, which the first epochs may leave

    def points(self) -> pd.DataFrame:
        """One row per cell and epoch."""
        return _trace_points(self.traces, "epoch", self.metric)


@dataclass(frozen=True)
class Axis:
    """One parameter of the parallel coordinates; `ticks` are (position in 0..1, label)."""

    name: str
    log: bool
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Parallel:
    """All finished search trials of one cell, each a polyline through its parameters."""

    head: Head
    metric: str
    axes: tuple[Axis, ...]
    trials: tuple[str, ...]
    positions: tuple[tuple[float, ...], ...]  # [trial][axis], 0..1; NaN where the parameter does not exist
    values: tuple[float, ...]  # of the metric
    best: int  # index of the selected trial

    def points(self) -> pd.DataFrame:
        """One row per trial: positions on the axes and the metric."""
        frame = pd.DataFrame(list(self.positions), columns=[axis.name for axis in self.axes])
        frame.insert(0, "trial", list(self.trials))
        return frame.assign(**{self.metric: list(self.values)})


@dataclass(frozen=True)
class Cloud:
    """The finished search trials of a cell by two numbers."""

    cell: str
    task: str
    ratio: float
    trials: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    front: tuple[int, ...]  # trials that no other one beats in both
    selected: int | None  # None: it lacks one of the two numbers


@dataclass(frozen=True)
class Tradeoff:
    """Two numbers of every search trial against each other."""

    head: Head
    x: str
    y: str
    x_higher: bool  # a higher x is better
    clouds: tuple[Cloud, ...]

    def points(self) -> pd.DataFrame:
        """One row per cell and trial."""
        rows = [
            (cloud.cell, cloud.task, cloud.ratio, name, cloud.x[k], cloud.y[k], k in cloud.front, k == cloud.selected)
            for cloud in self.clouds
            for k, name in enumerate(cloud.trials)
        ]
        return pd.DataFrame(rows, columns=["cell", "task", "ratio", "trial", self.x, self.y, "on_front", "selected"])


Figure = Sensitivity | Importance | History | Curves | Parallel | Tradeoff


def palette_of(results: Results) -> Palette:
    """The study's palette: all of its cells, finished or not."""
    return Palette(tuple(results.tasks()), tuple(results.ratios()))


def sensitivity(results: Results, parameter: str) -> Sensitivity:
    """The sweep of `parameter`, as the model's FIGURES name it; of `ratio`, beside the predictors of the same cells."""
    part = f"sweep:{parameter}"
    rows = results.finished(part)
    column = f"params.{parameter}"
    if rows.empty or column not in rows.columns:
        raise MissingError(f"sweep of {parameter}: no finished run of part {part}; run `study sweep`")
    labels = results.labels
    look = labels.figures.get(parameter, interface.Figure())
    texts = rows[column].astype(str)
    values = _values(list(texts.unique()), look.order)
    numeric = all(isinstance(value, float) for value in values)
    rows = rows.assign(_x=[float(text) if numeric else text for text in texts])
    if parameter == RATIO:
        rows = rows.assign(cell=[_row_name(labels, str(name)) for name in rows["name"]], ratio=math.nan)
    of_kind = (in_group(name, group) for name in labels.task_type.sensitivity for group in labels.task_type.groups)
    metrics = look.metrics or tuple(f"val_{name}" for name in of_kind)
    drawn = tuple(_panel(rows, metric, values) for metric in metrics)
    panels = tuple(panel for panel in drawn if any(line.x for line in panel.lines))
    if not panels:
        raise MissingError(f"sweep of {parameter}: no finished run logged {' or '.join(metrics)}; run `study sweep`")
    expected = sorted(rows["cell"].unique()) if parameter == RATIO else results.cells_of_plan()
    notes = _lacking(rows, expected, values, parameter)
    if any(_is_cut(panel) for panel in panels):
        notes += ("Intervals wider than the axis are cut at its edge; the CSV holds their ends.",)
    marks = _marks(results, part, values)
    notes += tuple(_published(mark) for mark in marks)
    title = look.title or f"Sensitivity to {parameter}"
    lines = "model and predictor" if parameter == RATIO else f"{labels.task_type.ratio} ratio"
    alt = f"{title}: one line per task and {lines} over {', '.join(value_text(value) for value in values)}."
    name = look.name or f"sensitivity_{parameter}"
    head = Head(labels, name, _titled(title, results), alt, palette_of(results), notes)
    return Sensitivity(head, parameter, values, numeric and _is_log(values), panels, marks)


def _marks(results: Results, part: str, values: Sequence[float | str]) -> tuple[Mark, ...]:
    """The published optima of a sweep: of a number its range, of a category the one that is best of all."""
    labels, dataset = results.labels, results.labels.published.dataset if results.labels.published else ""
    marks: dict[tuple[tuple[str, ...], float | str, float | str], Mark] = {}
    for claim in labels.paper.claims if labels.paper else ():
        if claim.part != part or (claim.dataset and claim.dataset != dataset):
            continue
        found: tuple[float | str, float | str] | None = None
        if isinstance(claim.form, Optimum):
            found = (claim.form.low, claim.form.high)
        elif isinstance(claim.form, Order) and len(claim.form.levels[0]) == 1:
            (name,) = claim.form.levels[0]
            found = (name, name) if name in values else None
        if found is not None:
            marks.setdefault((claim.tasks, *found), Mark(claim.tasks, *found, claim.place))
    return tuple(marks.values())


def _published(mark: Mark) -> str:
    span = value_text(mark.low) if mark.low == mark.high else f"{value_text(mark.low)} to {value_text(mark.high)}"
    tasks = ", ".join(task.replace("->", " → ") for task in mark.tasks) or "every task"
    return f"Published optimum: {span} ({tasks}; {mark.place})."


def importance(results: Results) -> Importance:
    """Parameter importance by Optuna's PED-ANOVA, on a study rebuilt from the logged search trials of each cell.

    Ranges are those that the trials covered. Cells with fewer than MIN_TRIALS finished trials are left out and named.
    """
    metric, direction = results.labels.selection
    rows = _search_rows(results, metric)
    names = results.searched()
    kinds = {name: _distribution(rows[f"params.{name}"].dropna().astype(str).tolist()) for name in names}
    cells, notes = [], []
    for cell, trials in rows.groupby("cell", sort=True):
        if len(trials) < MIN_TRIALS or trials[f"metrics.{metric}"].nunique() < 2:
            notes.append(f"{cell}: {len(trials)} finished trials are too few (at least {MIN_TRIALS}).")
            continue
        first = trials.iloc[0]
        shares = _importances(trials, kinds, metric, direction)
        cells.append(CellImportance(str(cell), str(first["task"]), float(first["ratio"]), len(trials), shares))
    if not cells or not names:
        raise MissingError(
            f"importance: no cell has {MIN_TRIALS} finished search trials that differ; run `study search`"
        )
    shown = {name for cell in cells for name in cell.shares}
    absent = sorted(set(names) - shown)
    if absent:
        notes.append(f"{', '.join(absent)}: exists in some trials only and has no importance.")
    means = {name: sum(cell.shares.get(name, 0.0) for cell in cells) / len(cells) for name in shown}
    order = sorted(shown, key=lambda name: (-means[name], name))
    alt = "Importance of each searched parameter: " + ", ".join(f"{name} {means[name]:.2f}" for name in order) + "."
    head = Head(
        results.labels, "importance", _titled("Parameter importance", results), alt, palette_of(results), tuple(notes)
    )
    return Importance(head, metric, tuple(order), tuple(means[name] for name in order), tuple(cells))


def history(results: Results) -> History:
    """Every finished search trial and the best so far, per cell."""
    metric, direction = results.labels.selection
    pick = min if direction == "minimize" else max
    traces, failed = [], results.trials[results.trials["status"].isin(["FAILED", "KILLED", "PRUNED"])]
    for cell, trials in _search_rows(results, metric).groupby("cell", sort=True):
        first = trials.iloc[0]
        x = tuple(int(name) for name in trials["name"])
        y = tuple(float(value) for value in trials[f"metrics.{metric}"])
        traces.append(Trace(str(cell), str(first["task"]), float(first["ratio"]), x, y, tuple(accumulate(y, pick))))
    lost = int((failed["part"] == "search").sum())
    notes = [f"{lost} search trials that failed or were stopped early are not shown."] if lost else []
    by_task = {task: [y for trace in traces if trace.task == task for y in trace.y] for task in results.tasks()}
    edge = {task: _edge(values, direction) for task, values in by_task.items()}
    sign = -1 if results.labels.higher else 1
    beyond = sum(sign * y > sign * edge[trace.task] for trace in traces for y in trace.y)
    if beyond:
        notes.append(f"{beyond} trials lie beyond the axis and are drawn at its edge.")
    title = "Optimisation history"
    alt = f"{title}: each search trial and the best so far, per task and {results.labels.task_type.ratio} ratio."
    head = Head(results.labels, "history", _titled(title, results), alt, palette_of(results), tuple(notes))
    return History(head, metric, tuple(traces), edge)


def curves(results: Results) -> Curves:
    """Validation metric over epochs of the selected search trial of each cell."""
    metric, direction = results.labels.selection
    pick = min if direction == "minimize" else max
    traces = []
    for best in best_per_cell(results.validation(), metric, direction).values():
        series = results.epochs(best.run_id, metric)
        x, y = tuple(int(epoch) for epoch in series["epoch"]), tuple(float(value) for value in series["value"])
        if x:
            traces.append(Trace(best.cell, best.task, best.ratio, x, y, tuple(accumulate(y, pick))))
    if not traces:
        raise MissingError(f"learning curves: no selected trial logged epoch/{metric}; run `study search`")
    title = "Learning curves of the selected configurations"
    alt = f"{title}: validation metric over epochs, one line per task and {results.labels.task_type.ratio} ratio."
    edge = _edge([y for trace in traces for y in trace.y], direction)
    head = Head(results.labels, "learning_curves", _titled(title, results), alt, palette_of(results))
    return Curves(head, metric, tuple(traces), edge)


def parallel(results: Results, cell: str) -> Parallel:
    """Parallel coordinates of one cell's finished search trials."""
    metric, direction = results.labels.selection
    every = _search_rows(results, metric)
    names = results.searched()
    rows = every[every["cell"] == cell]
    if rows.empty or not names:
        raise MissingError(f"parallel coordinates of {cell}: no finished search trials that differ; run `study search`")
    axes, columns = [], []
    for name in names:
        texts = every[f"params.{name}"]
        order = results.labels.figures.get(name, interface.Figure()).order
        values = _values(sorted(texts.dropna().astype(str).unique()), order)
        log = _is_log(values)
        columns.append(
            [math.nan if pd.isna(text) else _position(str(text), values, log) for text in rows[f"params.{name}"]]
        )
        axes.append(Axis(name, log, _ticks(values, log)))
    best = best_per_cell(results.validation(), metric, direction)[cell]
    title = f"Search trials of {cell.replace('->', ' → ').replace('@', f', {results.labels.task_type.ratio} ratio ')}"
    alt = f"{title}: one line per trial through {', '.join(names)}, coloured by the validation metric."
    return Parallel(
        Head(results.labels, parallel_name(cell), _titled(title, results), alt, palette_of(results)),
        metric,
        tuple(axes),
        tuple(rows["name"]),
        tuple(zip(*columns, strict=True)),
        tuple(float(value) for value in rows[f"metrics.{metric}"]),
        list(rows["run_id"]).index(best.run_id),
    )


def parallel_name(cell: str) -> str:
    """Of the files of a cell's parallel coordinates."""
    safe = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in cell.replace("->", "-"))
    return f"parallel_{safe}"


def _row_name(labels: Labels, name: str) -> str:
    """Of a trial of a ratio sweep: the predictor's name or the model's."""
    return name.removeprefix(PREDICTOR) if name.startswith(PREDICTOR) else labels.model


def _titled(title: str, results: Results) -> str:
    return f"{title} — simulated data" if results.simulated else title


def _search_rows(results: Results, metric: str) -> pd.DataFrame:
    """Finished search trials with a finite metric, by cell and name."""
    rows = results.validation()
    column = f"metrics.{metric}"
    if rows.empty or column not in rows.columns:
        raise MissingError(f"search: no finished trial with {metric}; run `study search`")
    return rows[rows[column].map(math.isfinite)].sort_values(["cell", "name"])


def _panel(rows: pd.DataFrame, metric: str, values: Sequence[float | str]) -> Panel:
    lines = []
    for (name, task), of_line in rows.groupby(["cell", "task"], sort=True):
        found = {row["_x"]: interval for _, row in of_line.iterrows() if (interval := _over_seeds(row, metric))}
        x = tuple(value for value in values if value in found)
        ratio = float(of_line.iloc[0]["ratio"])
        lines.append(Line(str(name), str(task), ratio, x, tuple(found[value] for value in x)))
    return Panel(metric, tuple(lines), *_limits(lines))


def _over_seeds(row: pd.Series, metric: str) -> Interval | None:
    values = per_seed(row, metric)
    return seed_interval(values) if values else None


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Ends of the axis: all means, and their intervals as far as they do not flatten the means."""
    intervals = [interval for line in lines for interval in line.y]
    if not intervals:
        return 0.0, 1.0
    low, high = min(i.value for i in intervals), max(i.value for i in intervals)
    ends = [end for i in intervals for end in (i.low, i.high) if math.isfinite(end)]
    room = _CUT * (high - low) if high > low else math.inf
    bottom = max(min([low, *ends]), low - room)
    top = min(max([high, *ends]), high + room)
    pad = 0.06 * (top - bottom) or 0.05
    return bottom - pad, top + pad


def _is_cut(panel: Panel) -> bool:
    return any(i.low < panel.low or i.high > panel.high for line in panel.lines for i in line.y)


def _lacking(
    rows: pd.DataFrame, expected: Sequence[str], values: Sequence[float | str], parameter: str
) -> tuple[str, ...]:
    """Which of the expected lines lack some values of the sweep, and which all."""
    notes, absent = [], []
    for name in expected:
        of_name = rows[rows["cell"] == name]
        for task, of_task in of_name.groupby("task", sort=True):
            there = set(of_task["_x"])
            lacks = [value_text(value) for value in values if value not in there]
            if lacks:
                line = name if name.startswith(str(task)) else f"{task}, {name}"
                notes.append(f"{line}: {parameter} = {', '.join(lacks)} missing.")
        if of_name.empty:
            absent.append(name)
    if absent:
        notes.append(f"No finished run in this sweep: {', '.join(absent)}.")
    return tuple(notes)


def _values(texts: Sequence[str], order: Sequence[str] = ()) -> tuple[float | str, ...]:
    """Numbers ascending where every text is one, else the texts, those of `order` first."""
    try:
        return tuple(sorted(float(text) for text in texts))
    except ValueError:
        return tuple(sorted(texts, key=lambda text: (order.index(text) if text in order else len(order), text)))


def _is_log(values: Sequence[float | str]) -> bool:
    numbers = [value for value in values if isinstance(value, float)]
    return len(numbers) == len(values) > 1 and numbers[0] > 0 and numbers[-1] / numbers[0] >= LOG_SPAN


def _position(text: str, values: Sequence[float | str], log: bool) -> float:
    if isinstance(values[0], str):
        return values.index(text) / max(1, len(values) - 1)
    low, high = float(values[0]), float(values[-1])
    if high == low:
        return 0.5
    if log:
        return math.log(float(text) / low) / math.log(high / low)
    return (float(text) - low) / (high - low)


def _ticks(values: Sequence[float | str], log: bool) -> tuple[tuple[float, str], ...]:
    """Every value where there are few, else the ends and the middle."""
    if len(values) <= 6 or isinstance(values[0], str):
        return tuple((_position(str(value), values, log), value_text(value)) for value in values)
    low, high = float(values[0]), float(values[-1])
    middle = math.sqrt(low * high) if log else (low + high) / 2
    return ((0.0, value_text(low)), (0.5, value_text(middle)), (1.0, value_text(high)))


def value_text(value: float | str) -> str:
    """A value as short as it can be read: 0.0005 is 5e-4."""
    if isinstance(value, str):
        return value
    if value and abs(value) < 0.01:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def _edge(values: Sequence[float], direction: str) -> float:
    """The worse end of an axis, which a few diverged trials may not stretch: four times the median's way from the best."""
    sign = 1.0 if direction == "minimize" else -1.0
    if not values:
        return sign * math.inf
    ordered = sorted(sign * value for value in values)
    best, median = ordered[0], ordered[len(ordered) // 2]
    cap = median + 4 * (median - best)
    return sign * (ordered[-1] if ordered[-1] <= cap or median == best else cap)


def _distribution(texts: Sequence[str]) -> BaseDistribution:
    """The range that the logged values of one parameter covered."""
    values = _values(sorted(set(texts)))
    if any(isinstance(value, str) for value in values):
        return CategoricalDistribution([str(value) for value in values])
    low, high, log = float(values[0]), float(values[-1]), _is_log(values)
    if all(text.lstrip("+-").isdigit() for text in texts):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _importances(
    trials: pd.DataFrame, kinds: Mapping[str, BaseDistribution], metric: str, direction: str
) -> Mapping[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # 1.5 s: it imports scikit-learn

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces each study in memory
    study = optuna.create_study(direction="minimize" if direction == "minimize" else "maximize")
    for _, row in trials.iterrows():
        texts = {name: str(row[f"params.{name}"]) for name in kinds if not pd.isna(row[f"params.{name}"])}
        params = {
            name: text
            if isinstance(kinds[name], CategoricalDistribution)
            else kinds[name].to_external_repr(float(text))
            for name, text in texts.items()
        }
        study.add_trial(
            optuna.create_trial(
                value=float(row[f"metrics.{metric}"]),
                params=params,
                distributions={name: kinds[name] for name in params},
            )
        )
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def _trace_points(traces: Sequence[Trace], x: str, metric: str) -> pd.DataFrame:
    rows = [
        (trace.cell, trace.task, trace.ratio, *point)
        for trace in traces
        for point in zip(trace.x, trace.y, trace.best, strict=True)
    ]
    return pd.DataFrame(rows, columns=["cell", "task", "ratio", x, metric, "best_so_far"])
