"""Several objectives: in each cell, the trials that no other one beats. Tagged in MLflow, and drawn beside all others.

Which of them later parts go on from: the one that is best by the selection metric (`study.best`); it lies on the front.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from study.jobs import Objective
from study.tracking import FINISHED, find_runs

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "study.pareto"


@dataclass(frozen=True, kw_only=True)
class Fronts:
    """All finished trials of a search; `points` has the columns cell, trial, run_id, front, and one per objective."""

    objectives: tuple[Objective, ...]
    points: pd.DataFrame


def front(values: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> list[bool]:
    """For each trial, whether none is at least as good in every objective and better in one."""
    signs = [1.0 if objective.direction == "minimize" else -1.0 for objective in objectives]
    costs = np.asarray(values, dtype=float).reshape(len(values), len(signs)) * signs
    return [bool(~((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()) for own in costs]


def mark_front(client: MlflowClient, experiment_id: str, objectives: Sequence[Objective]) -> Fronts:
    """Tag the runs on each cell's front `study.pareto` = true and no others. The figure goes to the search's own run."""
    rows, marked, parent = [], set(), None
    for run in find_runs(client, experiment_id, "search"):
        tags = run.data.tags
        if TAG in tags:
            marked.add(run.info.run_id)
        if "study.trial" not in tags:
            parent = run.info.run_id
        elif run.info.status == FINISHED:
            values = {objective.metric: run.data.metrics[objective.metric] for objective in objectives}
            rows.append({"cell": tags["study.cell"], "trial": tags["study.trial"], "run_id": run.info.run_id, **values})
    names = [objective.metric for objective in objectives]
    points = pd.DataFrame(rows, columns=["cell", "trial", "run_id", *names]).sort_values("trial", ignore_index=True)
    on_front: dict[str, bool] = {}
    for _, of_cell in points.groupby("cell"):
        on_front |= dict(zip(of_cell["run_id"], front(of_cell[names].to_numpy().tolist(), objectives), strict=True))
    points["front"] = [on_front[run_id] for run_id in points["run_id"]]
    chosen = {run_id for run_id, on in on_front.items() if on}
    for run_id in chosen - marked:
        client.set_tag(run_id, TAG, "true")
    for run_id in marked - chosen:
        client.delete_tag(run_id, TAG)
    fronts = Fronts(objectives=tuple(objectives), points=points)
    if parent is not None and not points.empty:
        with tempfile.TemporaryDirectory() as folder:
            for path in draw(fronts, Path(folder)):
                client.log_artifact(parent, str(path), "figures")
    return fronts


def draw(fronts: Fronts, folder: Path) -> list[Path]:
    """`pareto.png`, the first two objectives with a panel per cell, and `pareto.csv`, all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = (objective.metric for objective in fronts.objectives[:2])
    cells = list(fronts.points.groupby("cell", sort=True))
    figure = Figure(figsize=(4 * len(cells), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (cell, points) in enumerate(cells, start=1):
        axes = figure.add_subplot(1, len(cells), position)
        best = points[points["front"]].sort_values([x, y])
        axes.scatter(points[x], points[y], s=14, color="#999999", label="trials")
        axes.plot(best[x], best[y], marker="o", color="#0072B2", label="Pareto front")
        axes.set(title=str(cell), xlabel=x, ylabel=y)
        axes.legend(frameon=False)
    picture, table = folder / "pareto.png", folder / "pareto.csv"
    figure.savefig(picture, dpi=150, metadata={"Software": None})
    fronts.points.to_csv(table, index=False, lineterminator="\n")
    return [picture, table]
