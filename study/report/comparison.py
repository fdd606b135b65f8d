"""Table 2's numbers: simple predictors, the model and what was published of it, per cell and group of test rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from features.errors import InputError
from study.labels import Labels, in_group
from study.report.statistics import Interval, UserErrors, bootstrap, paired_difference, seed_interval
from study.specs import PREDICTOR
from study.tracking.results import MissingError, Results, per_seed
from trainables.task_types import Metric


@dataclass(frozen=True)
class Row:
    """One line of Table 2: a predictor, the model, or what was published of it, in one cell and group of test rows."""

    cell: str
    task: str
    ratio: float
    group: str  # protocol; empty where the kind has no groups
    name: str
    seeds: int  # 0: published
    users: int
    size: int  # test ratings, or other cases
    validation: Mapping[str, Interval]
    test: Mapping[str, Interval]
    difference: Mapping[str, Interval] | None  # to the bar; None for itself and where they cannot be compared

    @property
    def target(self) -> str:
        """Name of the target domain."""
        return self.task.partition("->")[2]


@dataclass(frozen=True)
class Comparison:
    """All rows of Table 2, cells in order, predictors first."""

    labels: Labels
    metrics: tuple[Metric, ...]
    headline: Metric  # the one that is held against the bar
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @cached_property
    def best(self) -> frozenset[tuple[str, str, str]]:
        """(cell, group, row) with the best headline of its cell and group, published rows aside."""
        pick = min if self.headline.better == "lower" else max
        measured = [row for row in self.rows if row.seeds]
        found = (
            pick((row for row in measured if (row.cell, row.group) == where), key=self._headline)
            for where in {(row.cell, row.group) for row in measured}
        )
        return frozenset((row.cell, row.group, row.name) for row in found)

    def _headline(self, row: Row) -> float:
        return row.test[self.headline.name].value


def compare(results: Results, *, full: bool = False) -> Comparison:
    """Predictors and the model's selected configuration on validation and test; `full`: in the full ranking."""
    scores = results.finished("score")
    if scores.empty:
        raise MissingError("Table 2: no finished run of part score; run `study score`")
    task_type = results.labels.task_type
    metrics = task_type.full if full else task_type.metrics
    (headline,) = (metric for metric in metrics if metric.name.removeprefix("full_") == task_type.headline)
    rows: list[Row] = []
    notes: list[str] = []
    for cell, runs in scores.groupby("cell", sort=True):
        named = {str(run["name"]): run for _, run in runs.iterrows()}
        order = [f"{PREDICTOR}{name}" for name in task_type.predictors]
        order += sorted(name for name in named if not name.startswith(PREDICTOR))
        notes += [f"{cell}: no score of {name.removeprefix(PREDICTOR)}." for name in order if name not in named]
        if all(name.startswith(PREDICTOR) for name in named):
            notes.append(f"{cell}: no score of the model.")
        frames, lost = _frames(results, [named[name] for name in order if name in named])
        notes += lost
        for group in task_type.groups:
            made, lost = _rows(results, [named[name] for name in frames], frames, metrics, group)
            rows += made
            notes += lost
    if not rows:
        raise MissingError(f"Table 2: no scored run can be read ({notes[0]}); run `study score`")
    published = results.labels.published
    if published is not None and any(row.seeds == 0 for row in rows):
        notes.append(published.paper.note)
    return Comparison(results.labels, metrics, headline, tuple(rows), tuple(dict.fromkeys(notes)))


def _frames(results: Results, runs: Sequence[pd.Series]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """`per_user.csv` of each run by its name, and why some have none."""
    frames, notes = {}, []
    for run in runs:
        try:
            frames[str(run["name"])] = results.per_user(str(run["run_id"]))
        except InputError as error:
            notes.append(f"{run['cell']}, {str(run['name']).removeprefix(PREDICTOR)}: {error}.")
    return frames, notes


def _rows(
    results: Results,
    runs: Sequence[pd.Series],
    frames: Mapping[str, pd.DataFrame],
    metrics: Sequence[Metric],
    group: str,
) -> tuple[list[Row], list[str]]:
    """Lines of one cell and group, the published one last, and notes on what cannot be read or compared."""
    labels, notes = results.labels, []
    errors: dict[str, UserErrors] = {}
    for run in runs:
        name = str(run["name"])
        frame = frames[name]
        if group and labels.task_type.group_column in frame.columns:
            frame = frame[frame[labels.task_type.group_column] == group]
            if frame.empty:
                continue  # the plan leaves this group out
        try:
            errors[name] = UserErrors.from_frame(frame, metrics, place=f"run {run['run_id']}: per_user.csv")
        except InputError as error:
            notes.append(f"{run['cell']}, {name.removeprefix(PREDICTOR)}: {error}.")
    base = errors.get(f"{PREDICTOR}{labels.task_type.reference}")
    rows = []
    for run in (run for run in runs if str(run["name"]) in errors):
        found, short = errors[str(run["name"])], shown_name(results, run)
        difference = None
        if base is not None and base is not found:
            try:
                difference = paired_difference(found, base)
            except InputError as error:
                notes.append(f"{run['cell']}, {short}: {error}.")
        rows.append(_row(run, group, short, found, difference))
    if rows and (row := _published_row(labels, rows[0], metrics)):
        rows.append(row)
    return rows, notes


def _row(run: pd.Series, group: str, short: str, errors: UserErrors, difference: Mapping[str, Interval] | None) -> Row:
    columns = {metric.name: f"val_{in_group(metric.name, group)}" for metric in errors.metrics}
    return Row(
        cell=str(run["cell"]),
        task=str(run["task"]),
        ratio=float(run["ratio"]),
        group=group,
        name=short,
        seeds=errors.seeds,
        users=len(errors.users),
        size=errors.size,
        validation={name: over_seeds(run, column) for name, column in columns.items() if per_seed(run, column)},
        test=bootstrap(errors),
        difference=difference,
    )


def _published_row(labels: Labels, beside: Row, metrics: Sequence[Metric]) -> Row | None:
    """What was published of the model in the cell and group of a measured row, where anything was."""
    published = labels.published
    if published is None or published.paper.group != beside.group:
        return None
    method = published.paper.method
    values = {metric.name: published.comparison.value(method, beside.cell, metric.name) for metric in metrics}
    test = {name: printed(value) for name, value in values.items() if value is not None}
    if not test:
        return None
    return Row(
        cell=beside.cell, task=beside.task, ratio=beside.ratio, group=beside.group,
        name=f"{method}, published", seeds=0, users=0, size=0, validation={}, test=test, difference=None,
    )  # fmt: skip


def printed(value: float) -> Interval:
    """A published number: no interval, no seeds."""
    return Interval(value, math.nan, math.nan, 0)


def shown_name(results: Results, run: pd.Series) -> str:
    """A predictor's name, or the model's for its selected configuration."""
    name = str(run["name"])
    if name.startswith(PREDICTOR):
        return name.removeprefix(PREDICTOR)
    return results.labels.model if name == "best" else name


def over_seeds(run: pd.Series, metric: str) -> Interval:
    """Mean over the seeds that the run logged, with its t interval."""
    return seed_interval(per_seed(run, metric))
