"""The best configuration of each cell, chosen on validation alone.

`best_per_cell` is given `Results.validation()`, a frame that has no test column, and refuses one that has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from features.errors import InputError


@dataclass(frozen=True)
class Best:
    """The selected trial of one cell; `Results.config(run_id)` is its full configuration."""

    cell: str
    task: str
    ratio: float
    run_id: str
    name: str
    value: float  # of the selection metric, on validation
    of: int  # finished trials it was chosen from


def best_per_cell(validation: pd.DataFrame, metric: str, direction: str) -> dict[str, Best]:
    """Cell -> its best trial, cells sorted; equal values go to the first trial by name.

    Trials without a finite value of `metric` cannot win. Raises InputError for a direction other than minimize and
    maximize, a metric that no trial logged, and a frame that holds a test column.
    """
    if direction not in ("minimize", "maximize"):
        raise InputError(f"selection: direction must be minimize or maximize, is {direction!r}; correct it")
    leaked = sorted(str(name) for name in validation.columns if "test_" in str(name))
    if leaked or metric.startswith("test_"):
        raise InputError(
            f"selection: must not see test data, got {', '.join(leaked) or metric}; use validation metrics"
        )
    column = f"metrics.{metric}"
    if validation.empty:
        return {}
    if column not in validation.columns:
        raise InputError(f"selection: no finished trial logged {metric!r}; run the search, or select on another metric")
    sign = 1.0 if direction == "minimize" else -1.0
    finite = validation[validation[column].map(math.isfinite)]
    ordered = finite.assign(_key=sign * finite[column]).sort_values(["cell", "_key", "name"])
    best: dict[str, Best] = {}
    for cell, rows in ordered.groupby("cell", sort=True):
        first = rows.iloc[0]
        best[str(cell)] = Best(
            cell=str(cell),
            task=str(first["task"]),
            ratio=float(first["ratio"]),
            run_id=str(first["run_id"]),
            name=str(first["name"]),
            value=float(first[column]),
            of=len(rows),
        )
    return best
