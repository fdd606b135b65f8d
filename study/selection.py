"""What is chosen among trials, on validation alone: the best of each row and cell, and those that no other one beats.

`best_trials` is given `Results.validation()`, a frame that has no test column, and refuses one that has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from features.errors import InputError

if TYPE_CHECKING:
    from trainables.interface import Selection


@dataclass(frozen=True)
class Best:
    """The selected trial of one row in one cell; `Results.config(run_id)` is its full configuration."""

    row: str
    cell: str
    task: str
    ratio: float
    run_id: str
    name: str
    value: float  # of the selection metric, on validation
    trials: int  # finished ones that it was chosen from


def best_trials(validation: pd.DataFrame, selection: Selection) -> dict[tuple[str, str], Best]:
    """Return the best trial of each (row, cell), sorted; of equal values the first by name.

    Trials without a finite value of the metric cannot win. Raises InputError for a metric that no trial logged, and for a
    frame that holds a test column.
    """
    metric = selection.metric
    leaked = sorted(str(name) for name in validation.columns if "test_" in str(name))
    if leaked or metric.startswith("test_"):
        raise InputError(
            f"selection: sees the test columns {', '.join(leaked) or metric}; give validation metrics alone"
        )
    column = f"metrics.{metric}"
    if validation.empty:
        return {}
    if column not in validation.columns:
        raise InputError(f"selection: no finished trial logged {metric!r}; run the search, or select on another metric")
    finite = validation[validation[column].map(math.isfinite)]
    ordered = finite.sort_values("name", kind="stable").sort_values(
        column, kind="stable", ascending=selection.direction == "minimize"
    )
    best: dict[tuple[str, str], Best] = {}
    for (row, cell), trials in ordered.groupby(["row", "cell"], sort=True):
        first = trials.iloc[0]
        best[str(row), str(cell)] = Best(
            row=str(row),
            cell=str(cell),
            task=str(first["task"]),
            ratio=float(first["ratio"]),
            run_id=str(first["run_id"]),
            name=str(first["name"]),
            value=float(first[column]),
            trials=len(trials),
        )
    return best


def pareto_front(values: Sequence[Sequence[float]], higher: Sequence[bool]) -> list[bool]:
    """Return for each trial whether none is at least as good in every number and better in one.

    `values` holds a trial's numbers; `higher` says of each number whether a higher one is better.
    """
    signs = np.where(higher, -1.0, 1.0)
    costs = np.asarray(values, dtype=float).reshape(len(values), len(signs)) * signs
    return [bool(~((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()) for cost in costs]
