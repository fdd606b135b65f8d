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
    """Make what trials share and is not there, for each row whose model has `prepare`; on a cluster by its workers.

    only: rows that are trained; the others need nothing. None named: all.

    tasks: by cell name and feature set. What several rows, directions or seeds share is made once, and no worker waits
    for the end of another row.
    """
    server, device = task_server() if on_ray else None, "cuda" if plan.resources.gpus > 0 else "cpu"
    calls: list[tuple[Any, ...]] = []
    titles: dict[str, None] = {}
    claimed: set[Path] = set()
    for row in plan.rows:
        if not trial.has_shared(row.model) or (only and row.name not in only):
            continue
        for cell, feature_set, seed in _planned(plan, row):
            config, task_dir = _config(row, cell), tasks[cell, feature_set].task_dir
            store = Home.of_task(task_dir).tasks
            folders = {store / folder for folder in trial.shared(row.model, config, str(task_dir), [seed])}
            missing = {folder for folder in folders - claimed if not folder.is_dir()}
            if missing:
                claimed |= missing
                titles[row.title] = None
                calls.append((server, row.model, config, task_dir, [seed], device))
    if not calls:
        return
    advance = start_progress(f"pretraining {', '.join(titles)}", len(calls))
    for done, _ in enumerate(run_calls(prepare_one, calls, plan.resources, on_ray=on_ray), 1):
        advance(done)


def _planned(plan: Plan, row: Row) -> list[Call]:
    """Return what the row's planned trials train on."""
    jobs = (job for jobs in parts.planned(plan).values() for job in jobs if job.row == row.name)
    return sorted({(job.cell.name, job.feature_set, seed) for job in jobs for seed in job.seeds})


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
