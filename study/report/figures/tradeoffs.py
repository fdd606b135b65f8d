"""Two numbers of every search trial: the Pareto front of two metrics, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from study.labels import in_group
from study.report.figures.figures import Cloud, Head, Tradeoff, palette_of
from study.selection import best_per_cell
from study.tracking.results import MissingError, Results


def pareto(results: Results) -> Tradeoff:
    """The first two objectives of the search; where it has one, both metrics (or protocols) of the sensitivity figures."""
    task_type = results.labels.task_type
    names = [f"val_{in_group(name, group)}" for name in task_type.sensitivity for group in task_type.groups]
    x, y, *others = results.objectives or names[:2]
    title = "Search trials by two metrics: the Pareto front"
    if not others:
        return _tradeoff(results, "pareto", title, x, y)
    note = (
        f"The search also had {', '.join(others)} as objectives: runs on the front of all have the tag `study.pareto`."
    )
    return _tradeoff(results, "pareto", title, x, y, (note,))


def cost(results: Results) -> Tradeoff:
    """The selection metric against the time that training a configuration took."""
    title = "Quality against cost of the search trials"
    return _tradeoff(results, "cost_quality", title, "seconds", results.labels.selection[0])


def _tradeoff(results: Results, name: str, title: str, x: str, y: str, notes: tuple[str, ...] = ()) -> Tradeoff:
    rows = results.validation()
    columns = [f"metrics.{x}", f"metrics.{y}"]
    if rows.empty or not set(columns) <= set(rows.columns):
        raise MissingError(f"{title.lower()}: no finished search trial with {x} and {y}; run `study search`")
    rows = rows[rows[columns].map(math.isfinite).all(axis=1)].sort_values(["cell", "name"])
    best = best_per_cell(results.validation(), *results.labels.selection)
    higher = [_is_higher(results, column) for column in columns]
    clouds = [_cloud(of_cell, columns, higher, best[str(cell)].run_id) for cell, of_cell in rows.groupby("cell")]
    alt = f"{title}: one point per trial, one panel per task; " + "; ".join(
        f"{cloud.cell}: {len(cloud.front)} of {len(cloud.trials)} trials on the front" for cloud in clouds
    )
    simulated = " — simulated data" if results.simulated else ""
    head = Head(results.labels, name, title + simulated, alt + ".", palette_of(results), notes)
    return Tradeoff(head, x, y, higher[0], tuple(clouds))


def _cloud(rows: pd.DataFrame, columns: Sequence[str], higher: Sequence[bool], selected: str) -> Cloud:
    x, y = (tuple(float(value) for value in rows[column]) for column in columns)
    up = [[value if is_higher else -value for value in of] for of, is_higher in zip((x, y), higher, strict=True)]
    first, ids = rows.iloc[0], list(rows["run_id"])
    return Cloud(
        str(first["cell"]), str(first["task"]), float(first["ratio"]), tuple(rows["name"]), x, y, front(*up),
        ids.index(selected) if selected in ids else None,
    )  # fmt: skip


def front(x: Sequence[float], y: Sequence[float]) -> tuple[int, ...]:
    """Indices of the points that no other one beats: as high in both and higher in one. Sorted by x."""
    kept: list[int] = []
    best = -math.inf
    for k in sorted(range(len(x)), key=lambda k: (-x[k], -y[k])):
        if y[k] > best:
            kept.append(k)
            best = y[k]
    return tuple(reversed(kept))


def _is_higher(results: Results, column: str) -> bool:
    task_type = results.labels.task_type
    names = {
        in_group(metric.name, group): metric.better for metric in task_type.metrics for group in ("", *task_type.groups)
    }
    return names.get(column.removeprefix("metrics.val_"), "lower") == "higher"
