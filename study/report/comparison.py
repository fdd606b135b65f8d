"""The numbers of Table 2: every row of the study beside what the paper prints of it, per cell and group of test rows.

Rows stand in the paper's order, after the simple baselines; a system that is printed and was not run has a line of its own
with the printed numbers alone. Each row is held against the subject of the study on the headline metric (an `Effect`: users
and training seeds, paired by both), with Holm's correction over the rows of a cell and group; and against the reference
baseline on every metric, with an interval over users.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd

from features.errors import InputError
from study.labels import Labels, RowLabels, in_group
from study.report.statistics import (
    Interval,
    Sample,
    UserTotals,
    difference_over_users,
    effect,
    holm,
    interval_over_users,
    pooled_spread,
    samples,
    seed_interval,
)
from study.tracking.results import MissingError, Results, is_baseline, per_seed
from trainables.task_types import Metric

ONE_SEED = "one seed, so the interval is over users alone and there is no p value"


@dataclass(frozen=True, kw_only=True)
class ToSubject:
    """A row minus the subject on the headline metric, in the metric's unit."""

    interval: Interval
    """By users and training seeds, at 95%; by users alone where nothing tells how seeds vary."""
    p: float
    """Two-sided; NaN where nothing tells how seeds vary."""
    p_holm: float
    """Corrected for the number of rows of the cell and group."""


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One line of Table 2: a row of the study, or a printed system that was not run, in one cell and group of test rows."""

    cell: str
    task: str
    ratio: float
    group: str
    """Protocol; empty where the task type has no groups."""
    labels: RowLabels
    seeds: int
    """0: not run, the paper's numbers alone."""
    users: int = 0
    size: int = 0
    """Test ratings, or other cases."""
    validation: Mapping[str, Interval] = field(default_factory=dict)
    test: Mapping[str, Interval] = field(default_factory=dict)
    printed: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the paper's number of this system."""
    to_reference: Mapping[str, Interval] | None = None
    """Minus the reference baseline; None for itself and where they cannot be compared."""
    to_subject: ToSubject | None = None
    """None for the subject and where they cannot be compared."""
    trials: int = 0
    """Ended trials of its search in this cell."""
    hours: float = math.nan
    """Trial-hours of its search and score in this cell; NaN: not logged."""

    @property
    def name(self) -> str:
        """The row's name as tables show it."""
        return self.labels.name


@dataclass(frozen=True)
class Comparison:
    """All lines of Table 2, cells in order."""

    labels: Labels
    metrics: tuple[Metric, ...]
    headline: Metric
    """The metric that marks the best row and is held against the subject."""
    rows: tuple[ComparedRow, ...]
    notes: tuple[str, ...]

    @cached_property
    def best(self) -> frozenset[tuple[str, str, str]]:
        """(cell, group, row) with the best headline among the rows that were run."""
        pick = min if self.headline.better == "lower" else max
        measured = [row for row in self.rows if row.seeds]
        best = (
            pick((row for row in measured if (row.cell, row.group) == place), key=self._headline)
            for place in {(row.cell, row.group) for row in measured}
        )
        return frozenset((row.cell, row.group, row.labels.row) for row in best)

    def _headline(self, row: ComparedRow) -> float:
        return row.test[self.headline.name].value


@dataclass(frozen=True)
class _Scored:
    """A scored row of one cell with its test users' rows."""

    run: pd.Series
    labels: RowLabels
    frame: pd.DataFrame

    @property
    def place(self) -> str:
        return f"{self.run['cell']}, {self.labels.name}"


def compare(results: Results, *, full: bool = False) -> Comparison:
    """Compare the selected configurations of all rows on validation and test; `full`: in the full ranking.

    Raises MissingError where no scored run can be read.
    """
    scores = results.finished("score")
    if scores.empty:
        raise MissingError("Table 2: no finished run of part score; run `study score`")
    labels, task_type = results.labels, results.labels.task_type
    metrics = task_type.full if full else task_type.metrics
    (headline,) = (metric for metric in metrics if metric.name.removeprefix("full_") == task_type.headline)
    spent = _Spent(results)
    rows: list[ComparedRow] = []
    notes: list[str] = []
    for cell, runs in scores.groupby("cell", sort=True):
        by_row = {str(run["row"]): run for _, run in runs.iterrows()}
        expected = [labels.row(name) for name in (*task_type.baselines, *labels.rows)]
        notes += [f"{cell}: no score of {row.name}." for row in expected if row.row not in by_row]
        scored, lost = _read(results, by_row)
        notes += lost
        for group in task_type.groups:
            compared, lost = _group(labels, scored, metrics, headline, group)
            rows += [spent.added_to(row) for row in compared]
            notes += lost
    if not rows:
        raise MissingError(f"Table 2: no scored run can be read ({notes[0]}); run `study score`")
    ordered = [line for place in _places(rows) for line in _in_order(labels, place, metrics)]
    notes += _fewer_trials(labels, ordered)
    if labels.published is not None and any(row.printed for row in ordered):
        notes.append(labels.published.paper.note)
    return Comparison(labels, metrics, headline, tuple(ordered), tuple(dict.fromkeys(notes)))


def _read(results: Results, by_row: Mapping[str, pd.Series]) -> tuple[list[_Scored], list[str]]:
    """Return the scored rows of a cell with their test users' rows, and why some have none."""
    scored, notes = [], []
    for row, run in by_row.items():
        labels = results.labels.row(row)
        try:
            scored.append(_Scored(run, labels, results.per_user(str(run["run_id"]))))
        except InputError as error:
            notes.append(f"{run['cell']}, {labels.name}: {error}.")
    return scored, notes


def _group(
    labels: Labels, scored: Sequence[_Scored], metrics: Sequence[Metric], headline: Metric, group: str
) -> tuple[list[ComparedRow], list[str]]:  # fmt: skip
    """Return the rows of one cell and group, and notes on what cannot be read or compared."""
    column, notes = labels.task_type.group_column, []
    totals: dict[str, UserTotals] = {}
    for row in scored:
        frame = row.frame[row.frame[column] == group] if group and column in row.frame.columns else row.frame
        if group and frame.empty:
            continue  # the plan leaves this group out
        try:
            place = f"run {row.run['run_id']}: per_user.csv"
            totals[row.labels.row] = UserTotals.from_frame(frame, metrics, place=place)
        except InputError as error:
            notes.append(f"{row.place}: {error}.")
    readable = [row for row in scored if row.labels.row in totals]
    drawn = {row.labels.row: samples(totals[row.labels.row], fixed=is_baseline(row.run)) for row in readable}
    comparable: dict[str, set[str]] = {}
    for anchor in (labels.task_type.reference, labels.model):
        comparable[anchor], lost = _comparable(readable, totals, anchor)
        notes += lost
    to_subject, lost = _to_subject(labels, readable, drawn, comparable[labels.model], headline)
    notes += lost
    rows = []
    for row in readable:
        name = row.labels.row
        columns = {metric.name: f"val_{in_group(metric.name, group)}" for metric in metrics}
        to_reference = None
        if name in comparable[labels.task_type.reference]:
            reference = drawn[labels.task_type.reference]
            to_reference = {key: difference_over_users(drawn[name][key], reference[key]) for key in reference}
        rows.append(
            ComparedRow(
                cell=str(row.run["cell"]),
                task=str(row.run["task"]),
                ratio=float(row.run["ratio"]),
                group=group,
                labels=row.labels,
                seeds=len(totals[name].seeds),
                users=len(totals[name].users),
                size=totals[name].size,
                validation={key: over_seeds(row.run, at) for key, at in columns.items() if per_seed(row.run, at)},
                test={key: interval_over_users(sample) for key, sample in drawn[name].items()},
                to_reference=to_reference,
                to_subject=to_subject.get(name),
            )
        )
    return rows, list(dict.fromkeys(notes))


def _comparable(
    scored: Sequence[_Scored], totals: Mapping[str, UserTotals], anchor: str
) -> tuple[set[str], list[str]]:  # fmt: skip
    """Return the rows that have the anchor's test users and cases, itself aside, and why others have not."""
    rows, notes = set(), []
    for row in scored if anchor in totals else ():
        if row.labels.row != anchor:
            try:
                totals[row.labels.row].check_paired(totals[anchor])
                rows.add(row.labels.row)
            except InputError as error:
                notes.append(f"{row.place}: {error}.")
    return rows, notes


def _to_subject(
    labels: Labels,
    scored: Sequence[_Scored],
    drawn: Mapping[str, Mapping[str, Sample]],
    rows: set[str],
    headline: Metric,
) -> tuple[dict[str, ToSubject], list[str]]:
    """Return the difference of each of `rows` to the subject, corrected for their number, and notes."""
    notes: list[str] = []
    trained = [drawn[row.labels.row][headline.name] for row in scored if not is_baseline(row.run)]
    spread = pooled_spread([list(sample.by_seed) for sample in trained])
    higher = headline.better == "higher"
    differences: dict[str, ToSubject] = {}
    for row in (row for row in scored if row.labels.row in rows):
        ours, subject = (drawn[name][headline.name] for name in (row.labels.row, labels.model))
        better = effect(ours, subject, higher=higher, spread=spread)
        if math.isnan(better.error):
            interval, p = difference_over_users(ours, subject), math.nan
            notes.append(f"{row.run['cell']}: {ONE_SEED}.")
        else:
            interval, p = better.interval(), min(1.0, 2 * min(better.tail(1), better.tail(-1)))
            if not higher:
                interval = Interval(-interval.value, -interval.high, -interval.low, interval.n)
        differences[row.labels.row] = ToSubject(interval=interval, p=p, p_holm=math.nan)
    tested = [name for name, difference in differences.items() if not math.isnan(difference.p)]
    corrected = holm([differences[name].p for name in tested])
    changed = {name: replace(differences[name], p_holm=p) for name, p in zip(tested, corrected, strict=True)}
    return differences | changed, notes


@dataclass(frozen=True)
class _Spent:
    """What the search and the score of each row took."""

    results: Results

    @cached_property
    def _trials(self) -> Mapping[tuple[str, str], int]:
        trials = self.results.trials
        ended = trials[(trials["part"] == "search") & trials["status"].isin(["FINISHED", "PRUNED"])]
        return {(str(row), str(cell)): len(runs) for (row, cell), runs in ended.groupby(["row", "cell"])}

    @cached_property
    def _hours(self) -> Mapping[tuple[str, str], float]:
        trials = self.results.trials
        counted = trials[trials["part"].isin(["search", "score"])].dropna(subset=["spent"])
        return {
            (str(row), str(cell)): float(spent.sum()) / 3600
            for (row, cell), spent in counted.groupby(["row", "cell"])["spent"]
        }

    def added_to(self, row: ComparedRow) -> ComparedRow:
        place = row.labels.row, row.cell
        return replace(row, trials=self._trials.get(place, 0), hours=self._hours.get(place, math.nan))


def _places(rows: Sequence[ComparedRow]) -> Iterator[list[ComparedRow]]:
    """Yield the rows of each cell and group."""
    for place in dict.fromkeys((row.cell, row.group) for row in rows):
        yield [row for row in rows if (row.cell, row.group) == place]


def _in_order(labels: Labels, rows: Sequence[ComparedRow], metrics: Sequence[Metric]) -> Iterator[ComparedRow]:
    """Yield the rows of a cell and group in the order of the table, with the printed numbers and systems."""
    by_row = {row.labels.row: row for row in rows}
    order = [name for name in labels.table_order if name in by_row]
    printed = _printed(labels, rows[0], metrics)
    systems = {by_row[name].labels.paper_name for name in order}
    waiting = [name for name in printed if name not in systems]
    places = list(labels.published.comparison.rows) if labels.published else []
    for name in order:
        system = by_row[name].labels.paper_name
        while waiting and system and (system not in places or places.index(waiting[0]) < places.index(system)):
            yield _not_run(rows[0], waiting[0], printed[waiting.pop(0)])
        yield replace(by_row[name], printed=printed.get(system, {}))
    yield from (_not_run(rows[0], name, printed[name]) for name in waiting)
    yield from (row for name, row in sorted(by_row.items()) if name not in order)


def _not_run(place: ComparedRow, system: str, printed: Mapping[str, float]) -> ComparedRow:
    """Return the line of a printed system that was not run."""
    labels = RowLabels(row="", model="", name=system, paper_name=system, reads="")
    return ComparedRow(
        cell=place.cell, task=place.task, ratio=place.ratio, group=place.group, labels=labels, seeds=0, printed=printed
    )  # fmt: skip


def _printed(labels: Labels, place: ComparedRow, metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    """Return the printed numbers of a cell and group, system by system; empty where the paper has none."""
    published = labels.published
    if published is None or published.paper.group != place.group:
        return {}
    systems = {}
    for name in published.comparison.rows:
        values = {metric.name: published.comparison.value(name, place.cell, metric.name) for metric in metrics}
        if numbers := {metric: value for metric, value in values.items() if value is not None}:
            systems[name] = numbers
    return systems


def _fewer_trials(labels: Labels, rows: Sequence[ComparedRow]) -> list[str]:
    """Return a note on each rival that was searched with fewer trials than the subject."""
    subject = {row.cell: row.trials for row in rows if row.labels.row == labels.model}
    notes = []
    for name, rival in labels.rows.items():
        searched = {row.cell: row.trials for row in rows if row.labels.row == name and row.seeds}
        fewer = [f"{cell} {n} of {subject[cell]}" for cell, n in searched.items() if n < subject.get(cell, 0)]
        if fewer:
            notes.append(f"{rival.name} was searched with fewer trials than {labels.subject.name}: {', '.join(fewer)}.")
    return notes


def over_seeds(run: pd.Series, metric: str) -> Interval:
    """Return the mean over the seeds that the run logged, with its t interval."""
    return seed_interval(per_seed(run, metric))
