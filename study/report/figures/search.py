"""The search of one row: importance of its parameters, its history, learning curves and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from study.report.figures.common import (
    Head,
    axis_values,
    is_log,
    palette_of,
    row_name,
    row_title,
    search_trials,
    value_text,
    worse_end,
)
from study.selection import best_trials
from study.tracking.results import MissingError, Results, TooFewError
from trainables.interface import Figure as Look
from trainables.interface import Selection

MIN_TRIALS = 5  # fewer finished trials of a cell say nothing about importance


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
        """Return one line per cell and parameter."""
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
    stopped: tuple[tuple[int, float], ...] = ()  # search trials that were given up, and the metric of their last epoch

    @property
    def values(self) -> tuple[float, ...]:
        """Every y, of what was given up too."""
        return (*self.y, *(value for _, value in self.stopped))


@dataclass(frozen=True)
class History:
    """The search of every cell, trial by trial."""

    head: Head
    metric: str
    traces: tuple[Trace, ...]
    last: int  # number of the last search trial of any cell, whatever became of it
    edge: Mapping[str, float]  # task -> the worse end of its axis; trials beyond it are drawn there

    def points(self) -> pd.DataFrame:
        """Return one line per cell and trial that has a value."""
        finished = _trace_points(self.traces, "trial", self.metric).assign(stopped=False)
        stopped = [(trace.cell, trace.task, trace.ratio, *point) for trace in self.traces for point in trace.stopped]
        frame = pd.DataFrame(stopped, columns=["cell", "task", "ratio", "trial", self.metric]).assign(stopped=True)
        return pd.concat([finished, frame] if stopped else [finished]).sort_values(["cell", "trial"], kind="stable")


@dataclass(frozen=True)
class Curves:
    """Validation over the epochs of each cell's selected configuration."""

    head: Head
    metric: str
    traces: tuple[Trace, ...]
    edge: float  # the worse end of the axis, which the first epochs may leave

    def points(self) -> pd.DataFrame:
        """Return one line per cell and epoch."""
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
        """Return one line per trial: positions on the axes and the metric."""
        frame = pd.DataFrame(list(self.positions), columns=[axis.name for axis in self.axes])
        frame.insert(0, "trial", list(self.trials))
        return frame.assign(**{self.metric: list(self.values)})


def importance(results: Results, row: str) -> Importance:
    """Return parameter importance by Optuna's PED-ANOVA, on a study rebuilt from the logged search trials of each cell.

    Ranges are those that the trials covered. Cells with fewer than MIN_TRIALS finished trials are left out and named.
    """
    selection = results.labels.selection
    column = f"metrics.{selection.metric}"
    trials = search_trials(results, row, selection.metric)
    names = results.searched(row)
    ranges = {name: _distribution(trials[f"params.{name}"].dropna().astype(str).tolist()) for name in names}
    cells, notes = [], []
    for cell, of_cell in trials.groupby("cell", sort=True):
        if len(of_cell) < MIN_TRIALS or of_cell[column].nunique() < 2:
            notes.append(f"{cell}: {len(of_cell)} finished trials are too few (at least {MIN_TRIALS}).")
            continue
        first = of_cell.iloc[0]
        shares = _importances(of_cell, ranges, selection)
        cells.append(CellImportance(str(cell), str(first["task"]), float(first["ratio"]), len(of_cell), shares))
    if not cells or not names:
        raise TooFewError(
            f"importance: no cell has {MIN_TRIALS} finished search trials that differ; run `study search`, with more "
            "trials where it has ended"
        )
    present = {name for cell in cells for name in cell.shares}
    absent = sorted(set(names) - present)
    if absent:
        notes.append(f"{', '.join(absent)}: exists in some trials only and has no importance.")
    means = {name: sum(cell.shares.get(name, 0.0) for cell in cells) / len(cells) for name in present}
    order = sorted(present, key=lambda name: (-means[name], name))
    alt = "Importance of each searched parameter: " + ", ".join(f"{name} {means[name]:.2f}" for name in order) + "."
    head = Head(
        results.labels, row_name("importance", results, row), row_title("Parameter importance", results, row), alt,
        palette_of(results), tuple(notes),
    )  # fmt: skip
    return Importance(head, selection.metric, tuple(order), tuple(means[name] for name in order), tuple(cells))


def history(results: Results, row: str) -> History:
    """Return every search trial that has a value, finished or given up, and the best finished one so far, per cell."""
    labels, metric = results.labels, results.labels.selection.metric
    pick = max if labels.higher else min
    every = results.trials[(results.trials["part"] == "search") & (results.trials["row"] == row)]
    traces = []
    for cell, trials in search_trials(results, row, metric).groupby("cell", sort=True):
        first = trials.iloc[0]
        x = tuple(int(name) for name in trials["name"])
        y = tuple(float(value) for value in trials[f"metrics.{metric}"])
        stopped = _stopped(every[every["cell"] == cell], metric)
        best = tuple(accumulate(y, pick))
        traces.append(Trace(str(cell), str(first["task"]), float(first["ratio"]), x, y, best, stopped))
    if all(len(trace.values) < 2 for trace in traces):
        raise TooFewError(
            f"optimisation history of {labels.row(row).name}: no cell has two search trials with a value; run "
            "`study search`, with more trials"
        )
    title = row_title("Optimisation history", results, row)
    ended = int(every["status"].isin(["FINISHED", "FAILED", "KILLED", "PRUNED"]).sum())
    lost = ended - sum(len(trace.values) for trace in traces)
    notes = [f"{lost} search trials that have no value are not shown."] if lost else []
    by_task = {task: [y for trace in traces if trace.task == task for y in trace.values] for task in results.tasks()}
    edge = {task: worse_end(of_task, labels.higher) for task, of_task in by_task.items()}
    sign = -1 if labels.higher else 1
    beyond = sum(sign * y > sign * edge[task] for task, of_task in by_task.items() for y in of_task)
    if beyond:
        notes.append(f"{beyond} trials lie beyond the axis and are drawn at its edge.")
    alt = f"{title}: each search trial and the best so far, per task and {labels.task_type.ratio} ratio."
    head = Head(labels, row_name("history", results, row), title, alt, palette_of(results), tuple(notes))
    return History(head, metric, tuple(traces), int(every["name"].astype(int).max()), edge)


def _stopped(trials: pd.DataFrame, metric: str) -> tuple[tuple[int, float], ...]:
    """Number and last value of the trials that the search gave up."""
    column = f"metrics.epoch/{metric}"
    if column not in trials.columns:
        return ()
    given_up = trials[(trials["status"] == "PRUNED") & trials[column].map(math.isfinite)].sort_values("name")
    return tuple((int(name), float(value)) for name, value in zip(given_up["name"], given_up[column], strict=True))


def curves(results: Results, row: str) -> Curves:
    """Return the validation metric over the epochs of the selected search trial of each cell."""
    labels, metric = results.labels, results.labels.selection.metric
    pick = max if labels.higher else min
    traces = []
    for best in best_trials(results.validation(row=row), labels.selection).values():
        series = results.epochs(best.run_id, metric)
        x, y = tuple(int(epoch) for epoch in series["epoch"]), tuple(float(value) for value in series["value"])
        if x:
            traces.append(Trace(best.cell, best.task, best.ratio, x, y, tuple(accumulate(y, pick))))
    if not traces:
        raise MissingError(f"learning curves: no selected trial logged epoch/{metric}; run `study search`")
    title = row_title("Learning curves of the selected configurations", results, row)
    alt = f"{title}: validation metric over epochs, one line per task and {labels.task_type.ratio} ratio."
    edge = worse_end([y for trace in traces for y in trace.y], labels.higher)
    head = Head(labels, row_name("learning_curves", results, row), title, alt, palette_of(results))
    return Curves(head, metric, tuple(traces), edge)


def parallel(results: Results, row: str, cell: str) -> Parallel:
    """Return parallel coordinates of a row's finished search trials in one cell."""
    labels, metric = results.labels, results.labels.selection.metric
    every = search_trials(results, row, metric)
    names = results.searched(row)
    trials = every[every["cell"] == cell]
    if trials.empty or not names:
        raise TooFewError(
            f"parallel coordinates of {cell}: no finished search trials that differ; run `study search`, with more "
            "trials where it has ended"
        )
    axes, columns = [], []
    for name in names:
        texts = every[f"params.{name}"]
        order = labels.figures.get(name, Look()).order
        values = axis_values(sorted(texts.dropna().astype(str).unique()), order)
        log = is_log(values)
        columns.append(
            [math.nan if pd.isna(text) else _position(str(text), values, log) for text in trials[f"params.{name}"]]
        )
        axes.append(Axis(name, log, _ticks(values, log)))
    best = best_trials(results.validation(row=row), labels.selection)[row, cell]
    place = cell.replace("->", " → ").replace("@", f", {labels.task_type.ratio} ratio ")
    title = row_title(f"Search trials of {place}", results, row)
    alt = f"{title}: one line per trial through {', '.join(names)}, coloured by the validation metric."
    return Parallel(
        Head(labels, row_name(parallel_name(cell), results, row), title, alt, palette_of(results)),
        metric,
        tuple(axes),
        tuple(trials["name"]),
        tuple(zip(*columns, strict=True)),
        tuple(float(value) for value in trials[f"metrics.{metric}"]),
        list(trials["run_id"]).index(best.run_id),
    )


def parallel_name(cell: str) -> str:
    """Return the name of the files of a cell's parallel coordinates."""
    safe = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in cell.replace("->", "-"))
    return f"parallel_{safe}"


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


def _distribution(texts: Sequence[str]) -> BaseDistribution:
    """Return the range that the logged values of one parameter covered."""
    values = axis_values(sorted(set(texts)))
    if any(isinstance(value, str) for value in values):
        return CategoricalDistribution([str(value) for value in values])
    low, high, log = float(values[0]), float(values[-1]), is_log(values)
    if all(text.lstrip("+-").isdigit() for text in texts):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _importances(
    trials: pd.DataFrame, ranges: Mapping[str, BaseDistribution], selection: Selection
) -> Mapping[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # 1.5 s: it imports scikit-learn

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces each study in memory
    study = optuna.create_study(direction=selection.direction)
    for _, row in trials.iterrows():
        texts = {name: str(row[f"params.{name}"]) for name in ranges if not pd.isna(row[f"params.{name}"])}
        params = {
            name: text
            if isinstance(ranges[name], CategoricalDistribution)
            else ranges[name].to_external_repr(float(text))
            for name, text in texts.items()
        }
        study.add_trial(
            optuna.create_trial(
                value=float(row[f"metrics.{selection.metric}"]),
                params=params,
                distributions={name: ranges[name] for name in params},
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
