"""What the trials of a model share, made ahead of them: pretrained encoders, for example."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from study import parts
from study.engine.node_cache import bring_home, locate, task_server
from study.engine.pool import run_calls
from study.home import Home
from study.plan.schema import Plan, Row
from study.progress import StartProgress
from trainables import trial
from trainables.tasks.arrays import TaskFolders

Call = tuple[str, str, int]
"""Cell name, feature set, seed."""


def pretrain(
    plan: Plan, tasks: Mapping[tuple[str, str], TaskFolders], start_progress: StartProgress, *,
    only: Collection[str] = (), on_ray: bool = False,
) -> None:  # fmt: skip
    """Make what trials share, for each row whose model has `prepare`; on a cluster by its workers, not by the head.

    only: rows that are trained; the others need nothing. None named: all.

    tasks: by cell name and feature set. Rows take turns, so that a row finds what an equal one has made. Of each pair of
    domains one direction comes first, because what it makes may serve the other.
    """
    server, device = task_server() if on_ray else None, "cuda" if plan.resources.gpus > 0 else "cpu"
    for row in plan.rows:
        if not trial.has_shared(row.model) or (only and row.name not in only):
            continue
        directions = _calls(plan, row)
        advance, done = start_progress(f"pretraining {row.title}", sum(map(len, directions))), 0
        for direction in directions:
            calls = [
                (server, row.model, _config(row, cell), tasks[cell, feature_set].task_dir, [seed], device)
                for cell, feature_set, seed in direction
            ]
            for _ in run_calls(prepare_one, calls, plan.resources, on_ray=on_ray):
                done += 1
                advance(done)


def _calls(plan: Plan, row: Row) -> tuple[list[Call], list[Call]]:
    """Return what the row's planned trials train on: of one direction of each pair of domains, and of the other."""
    forward: set[Call] = set()
    backward: set[Call] = set()
    for jobs in parts.planned(plan).values():
        for job in jobs:
            if job.row == row.name:
                direction = backward if job.cell.source > job.cell.target else forward
                direction |= {(job.cell.name, job.feature_set, seed) for seed in job.seeds}
    return sorted(forward), sorted(backward)


def _config(row: Row, cell: str) -> dict[str, Any]:
    return {**row.config, **row.base.get(cell, {})}


def prepare_one(
    server: Any, model: str, config: Mapping[str, Any], task_dir: Path, seeds: Sequence[int], device: str = "cpu"
) -> None:  # fmt: skip
    """Make what trials of this configuration and these seeds share, on a worker.

    Where the worker does not see the home folder, what is there is fetched, and what is made is brought there.
    """
    here = str(locate(task_dir, server))
    missing = []
    if here != str(task_dir):
        store = Home.of_task(task_dir).tasks
        folders = [store / folder for folder in trial.shared(model, config, here, seeds)]
        missing = [folder for folder in folders if not locate(folder, server).is_dir()]
    trial.prepare(model, config, here, seeds, device)
    for folder in missing:
        bring_home(folder, server)
