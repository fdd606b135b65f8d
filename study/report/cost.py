"""What the trials of a study cost, by part and by row."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from study.report.table import Table
from study.specs import BASELINE
from study.tracking.results import Results

_NOTE = (
    "Ended trials, failed ones too, by the time that they ran: none passes between a stop and going on. Wall hours: time in"
    " which at least one of them ran, each in one stretch up to its end. Extraction is not in it."
)


def cost_table(results: Results) -> Table | None:
    """Return the table, or None where no trial has ended."""
    if results.trials.empty:
        return None
    ended = results.trials[results.trials["ended"].notna()]
    silent = int(ended["spent"].isna().sum())
    ended = ended.dropna(subset=["spent"])
    if ended.empty:
        return None
    lines = [_costs(str(part), "all", trials) for part, trials in ended.groupby("part", sort=True)]
    lines += _by_row(results, ended)
    frame = pd.DataFrame([*lines, _costs("all", "all", ended)])
    cells = pd.DataFrame(
        {
            "Part": frame["part"],
            "Row": [results.labels.row(row).name if row in results.labels.rows else row for row in frame["row"]],
            "Trials": frame["trials"],
            "Trial-hours": frame["trial_hours"].map("{:.3f}".format),
            "GPU-hours": ["not logged" if pd.isna(value) else f"{value:.3f}" for value in frame["gpu_hours"]],
            "Wall hours": frame["wall_hours"].map("{:.3f}".format),
        }
    )
    notes = [_NOTE]
    notes += [f"{silent} trials that do not say how long they ran are not in it."] if silent else []
    return Table("cost", "What it cost", frame, cells, tuple(notes))


def _by_row(results: Results, ended: pd.DataFrame) -> list[Mapping[str, object]]:
    """Return a line for each trained row and one for all simple baselines; none where there is one row alone."""
    is_baseline = ended["model"] == BASELINE
    order = {row: k for k, row in enumerate(results.labels.rows)}
    trained = sorted(ended[~is_baseline]["row"].unique(), key=lambda row: (order.get(row, len(order)), row))
    if len(trained) < 2:
        return []
    lines = [_costs("all", str(row), ended[ended["row"] == row]) for row in trained]
    return lines + ([_costs("all", "simple baselines", ended[is_baseline])] if is_baseline.any() else [])


def _costs(part: str, row: str, trials: pd.DataFrame) -> Mapping[str, object]:
    hours = trials["spent"] / 3600
    gpus = pd.to_numeric(trials["gpus"], errors="coerce")
    spans = sorted(zip(trials["ended"] - 1000 * trials["spent"], trials["ended"], strict=True))
    wall, until = 0.0, -math.inf
    for start, end in spans:
        wall += max(0.0, end - max(start, until))
        until = max(until, end)
    gpu_hours = float((hours * gpus).sum()) if gpus.notna().all() else math.nan
    return {
        "part": part, "row": row, "trials": len(trials), "trial_hours": float(hours.sum()), "gpu_hours": gpu_hours,
        "wall_hours": wall / 3.6e6,
    }  # fmt: skip
