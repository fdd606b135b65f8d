"""Several objectives: in each cell, the trials that no other one beats are tagged in MLflow; the report draws them.

Which of them later parts go on from: the one that is best by the selection metric (`study.best`); it lies on the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from study.specs import Objective
from study.tracking.runs import FINISHED, find_runs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

TAG = "study.pareto"
_OBJECTIVES = "study.objectives"


def front(values: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> list[bool]:
    """For each trial, whether none is at least as good in every objective and better in one."""
    signs = [1.0 if objective.direction == "minimize" else -1.0 for objective in objectives]
    costs = np.asarray(values, dtype=float).reshape(len(values), len(signs)) * signs
    return [bool(~((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()) for own in costs]


def mark_front(client: MlflowClient, experiment_id: str, objectives: Sequence[Objective]) -> None:
    """Tag the runs on each cell's front `study.pareto` = true and no others; the search's own run says the objectives.

    Without objectives, which an earlier form of the plan may have had, neither tag stays.
    """
    cells: dict[str, list[Run]] = {}
    marked = set()
    for run in find_runs(client, experiment_id, "search"):
        if TAG in run.data.tags:
            marked.add(run.info.run_id)
        if "study.trial" not in run.data.tags:
            names = ",".join(objective.metric for objective in objectives)
            if names:
                client.set_tag(run.info.run_id, _OBJECTIVES, names)
            elif _OBJECTIVES in run.data.tags:
                client.delete_tag(run.info.run_id, _OBJECTIVES)
        elif objectives and run.info.status == FINISHED:
            cells.setdefault(run.data.tags["study.cell"], []).append(run)
    chosen = set()
    for runs in cells.values():
        values = [[run.data.metrics[objective.metric] for objective in objectives] for run in runs]
        chosen |= {run.info.run_id for run, on in zip(runs, front(values, objectives), strict=True) if on}
    for run_id in chosen - marked:
        client.set_tag(run_id, TAG, "true")
    for run_id in marked - chosen:
        client.delete_tag(run_id, TAG)
