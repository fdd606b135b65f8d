"""Trials that are picked out of a search: the best of each row and cell, and the Pareto front of several objectives.

Which trial later parts go on from is the best by the selection metric (`study.best`); it lies on the front. Runs that
the plan does not ask for any more are neither.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from study.selection import best_trials, pareto_front
from study.specs import Objective
from study.tracking import tags
from study.tracking.runs import FINISHED, find_runs
from study.tracking.views import describe, place

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from trainables.interface import Selection

SEARCH = "search"  # the part that is searched
SCORE = "score"  # the part that scores on test users


def mark_best(client: MlflowClient, experiment_id: str, selection: Selection) -> dict[tuple[str, str], str]:
    """Tag the best trial of each row and cell of the search `study.best` = true, and no other; returns their run ids.

    The experiment's description becomes a table of them.
    """
    runs = list(find_runs(client, experiment_id, SEARCH))
    finished = {run.info.run_id: run for run in runs if tags.TRIAL in run.data.tags and run.info.status == FINISHED}
    trials = pd.DataFrame([_validation(run, selection.metric) for run in finished.values()])
    best = {key: finished[trial.run_id] for key, trial in best_trials(trials, selection).items()}
    chosen = {key: str(run.info.run_id) for key, run in best.items()}
    _mark(client, runs, tags.BEST, chosen.values())
    reasons = [tag for tag in (tags.PRUNED, tags.ERROR) if any(tag in run.data.tags for run in runs)]
    describe(client, experiment_id, finished=list(finished.values()), best=best, selection=selection, reasons=reasons)
    return chosen


def mark_front(client: MlflowClient, experiment_id: str, objectives: Sequence[Objective]) -> None:
    """Tag the runs on the front of each row and cell `study.pareto` = true and no others; the search says the objectives.

    Without objectives, which an earlier form of the plan may have had, neither tag stays.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    names = ",".join(objective.metric for objective in objectives)
    runs = list(find_runs(client, experiment_id, SEARCH))
    for run in runs:
        if tags.TRIAL not in run.data.tags:
            if names:
                client.set_tag(run.info.run_id, tags.OBJECTIVES, names)
            elif tags.OBJECTIVES in run.data.tags:
                client.delete_tag(run.info.run_id, tags.OBJECTIVES)
        elif objectives and run.info.status == FINISHED:
            groups.setdefault((run.data.tags[tags.ROW], run.data.tags[tags.CELL]), []).append(run)
    chosen: set[str] = set()
    for group in groups.values():
        values = [[run.data.metrics[objective.metric] for objective in objectives] for run in group]
        front = pareto_front(values, [objective.direction == "maximize" for objective in objectives])
        chosen |= {run.info.run_id for run, on in zip(group, front, strict=True) if on}
    _mark(client, runs, tags.PARETO, chosen)


def mark_places(client: MlflowClient, experiment_id: str, *, metric: str, maximize: bool) -> None:
    """Tag the finished scores of each cell, simple baselines included, with their place in it by a test metric.

    For people who look at MLflow alone; nothing is chosen by it.
    """
    scores = find_runs(client, experiment_id, SCORE)
    finished = [run for run in scores if tags.TRIAL in run.data.tags and run.info.status == FINISHED]
    place(client, finished, metric, maximize=maximize)


def _validation(run: Run, metric: str) -> dict[str, str | float]:
    """The columns of `Results.validation()` that selection reads."""
    run_tags = run.data.tags
    return {
        "row": run_tags[tags.ROW], "cell": run_tags[tags.CELL], "task": run_tags[tags.TASK],
        "ratio": float(run_tags[tags.RATIO]), "name": run_tags[tags.TRIAL], "run_id": run.info.run_id,
        f"metrics.{metric}": run.data.metrics[metric],
    }  # fmt: skip


def _mark(client: MlflowClient, runs: Iterable[Run], tag: str, chosen: Collection[str]) -> None:
    """Put the tag on the chosen runs of the search and on no others."""
    marked = {run.info.run_id for run in runs if tag in run.data.tags}
    for run_id in sorted(set(chosen) - marked):
        client.set_tag(run_id, tag, "true")
    for run_id in sorted(marked - set(chosen)):
        client.delete_tag(run_id, tag)
