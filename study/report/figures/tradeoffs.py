"""Two numbers of every search trial of a row: the Pareto front of two metrics, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from study.labels import in_group
from study.report.figures.common import Head, palette_of, row_name, row_title
from study.selection import best_trials, pareto_front
from study.tracking.results import MissingError, Results, TooFewError


@dataclass(frozen=True)
class Cloud:
    """The finished search trials of a cell by two numbers."""

    cell: str
    task: str
    ratio: float
    trials: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    front: tuple[int, ...]
    """Trials that no other one beats in both, by x."""
    selected: int | None
    """None: it lacks one of the two numbers."""


@dataclass(frozen=True)
class Tradeoff:
    """Two numbers of every search trial against each other."""

    head: Head
    x: str
    y: str
    x_higher: bool
    """Whether a higher x is better."""
    clouds: tuple[Cloud, ...]

    def points(self) -> pd.DataFrame:
        """Return one line per cell and trial."""
        lines = [
            (cloud.cell, cloud.task, cloud.ratio, name, cloud.x[k], cloud.y[k], k in cloud.front, k == cloud.selected)
            for cloud in self.clouds
            for k, name in enumerate(cloud.trials)
        ]
        return pd.DataFrame(lines, columns=["cell", "task", "ratio", "trial", self.x, self.y, "on_front", "selected"])


def pareto(results: Results, row: str) -> Tradeoff:
    """Return the first two objectives of the search; where it has one, two metrics (or protocols) of the sweeps."""
    task_type = results.labels.task_type
    names = [f"val_{in_group(name, group)}" for name in task_type.sensitivity for group in task_type.groups]
    x, y, *others = results.objectives or names[:2]
    title = "Search trials by two metrics: the Pareto front"
    if not others:
        return _tradeoff(results, row, "pareto", title, x, y)
    note = (
        f"The search also had {', '.join(others)} as objectives: runs on the front of all have the tag `study.pareto`."
    )
    return _tradeoff(results, row, "pareto", title, x, y, (note,))


def cost(results: Results, row: str) -> Tradeoff:
    """Return the selection metric against the time that training a configuration took."""
    title = "Quality against cost of the search trials"
    return _tradeoff(results, row, "cost_quality", title, "seconds", results.labels.selection.metric)


def _tradeoff(
    results: Results, row: str, name: str, title: str, x: str, y: str, notes: tuple[str, ...] = ()
) -> Tradeoff:  # fmt: skip
    trials = results.validation(row=row)
    columns = [f"metrics.{x}", f"metrics.{y}"]
    if trials.empty or not set(columns) <= set(trials.columns):
        raise MissingError(f"{title.lower()}: no finished search trial with {x} and {y}; run `study search`")
    best = best_trials(trials, results.labels.selection)
    trials = trials[trials[columns].map(math.isfinite).all(axis=1)].sort_values(["cell", "name"])
    higher = [_is_higher(results, column) for column in columns]
    clouds = [
        _cloud(of_cell, columns, higher, best[row, str(cell)].run_id) for cell, of_cell in trials.groupby("cell")
    ]  # fmt: skip
    if all(len(cloud.trials) < 2 for cloud in clouds):
        raise TooFewError(
            f"{title.lower()}: no cell has two finished search trials; run `study search`, with more trials"
        )
    alt = f"{title}: one point per trial, one panel per task; " + "; ".join(
        f"{cloud.cell}: {len(cloud.front)} of {len(cloud.trials)} trials on the front" for cloud in clouds
    )
    head = Head(
        results.labels, row_name(name, results, row), row_title(title, results, row), f"{alt}.", palette_of(results),
        notes,
    )  # fmt: skip
    return Tradeoff(head, x, y, higher[0], tuple(clouds))


def _cloud(trials: pd.DataFrame, columns: Sequence[str], higher: Sequence[bool], selected: str) -> Cloud:
    x, y = (tuple(float(value) for value in trials[column]) for column in columns)
    on_front = pareto_front(list(zip(x, y, strict=True)), higher)
    first, ids = trials.iloc[0], list(trials["run_id"])
    return Cloud(
        str(first["cell"]), str(first["task"]), float(first["ratio"]), tuple(trials["name"]), x, y,
        tuple(sorted((k for k, on in enumerate(on_front) if on), key=lambda k: (x[k], k))),
        ids.index(selected) if selected in ids else None,
    )  # fmt: skip


def _is_higher(results: Results, column: str) -> bool:
    directions = results.labels.task_type.validation_directions
    return directions.get(column.removeprefix("metrics.")) == "maximize"
