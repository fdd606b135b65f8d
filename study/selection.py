"""The best configuration of each row and cell, chosen on validation alone.

`best_per_cell` is given `Results.validation()`, a frame that has no test column, and refuses one that has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from features.errors import InputError
from study.tracking.marks import Candidate, rank

if TYPE_CHECKING:
    from trainables.interface import Selection


@dataclass(frozen=True, kw_only=True)
class Best:
    """The selected trial of a row in a cell; `Results.config(run_id)` is its full configuration."""

    row: str
    cell: str
    task: str
    ratio: float
    run_id: str
    name: str
    value: float  # of the selection metric, on validation
    trials: int  # finished ones it was chosen from


def best_per_cell(validation: pd.DataFrame, selection: Selection) -> dict[tuple[str, str], Best]:
    """(row, cell) -> its best trial, sorted; equal values go to the first trial by name.

    Trials without a finite value of the metric cannot win. Raises InputError for a metric that no trial logged, and for a
    frame that holds a test column.
    """
    leaked = sorted(str(name) for name in validation.columns if "test_" in str(name))
    if leaked or selection.metric.startswith("test_"):
        raise InputError(
            f"selection: must not see test data, got {', '.join(leaked) or selection.metric}; use validation metrics"
        )
    column = f"metrics.{selection.metric}"
    if validation.empty:
        return {}
    if column not in validation.columns:
        raise InputError(
            f"selection: no finished trial logged {selection.metric!r}; run the search, or select on another metric"
        )
    trials = validation[["row", "cell", "task", "ratio", "name", "run_id", column]].to_dict("records")
    ranked = rank((_candidate(trial, trial[column]) for trial in trials), selection)
    by_run = {str(trial["run_id"]): trial for trial in trials}
    best = {}
    for key, candidates in ranked.items():
        first = candidates[0]
        trial = by_run[first.run_id]
        best[key] = Best(
            row=first.row, cell=first.cell, task=str(trial["task"]), ratio=float(trial["ratio"]), run_id=first.run_id,
            name=first.name, value=first.value, trials=len(candidates),
        )  # fmt: skip
    return best


def _candidate(trial: Mapping[Any, Any], value: float) -> Candidate:
    row, cell, name, run_id = (str(trial[column]) for column in ("row", "cell", "name", "run_id"))
    return Candidate(row=row, cell=cell, name=name, run_id=run_id, value=float(value))
