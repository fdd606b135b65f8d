"""Runs the jobs of one part: exactly those that are not finished yet, whatever ended the driver before.

What is durable is Optuna's journal and MLflow. Every call reads from them what is left and gives that to a fresh Tuner;
Ray's own snapshots are never resumed from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from features.errors import InputError
from search_spaces import Space
from study.engine.optuna_study import close_storage, open_database, open_journal
from study.engine.reconcile import Failure, PartLedger, Progress, Recipe
from study.engine.warm_start import warm_trials
from study.specs import Cluster, Direction, Faults, Job, Resources, SearchSpec
from study.tracking import runs as tracking

__all__ = ["Failure", "Progress", "RunSummary", "at_work", "refuse_second", "run_jobs"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a call of `run_jobs` leaves."""

    planned: int
    ran: int
    """Trials that this call trained; 0: there was nothing left to do."""
    superseded: int
    """Runs of an earlier plan under the same names: deleted in MLflow (its UI restores them) and trained anew."""
    failures: tuple[Failure, ...]
    """All planned trials that failed, in this call or before."""
    stopped: str | None
    """Why trials of the plan were not started: the budget that is spent."""
    log: Path
    """Where Ray's own messages went."""


def run_jobs(
    *,
    experiment: str,
    home: Path,
    jobs: Sequence[Job],
    trainable: str,
    model: str,
    base: Mapping[str, Any],
    selection: tuple[str, Direction],
    space: Space | None = None,
    search: SearchSpec | None = None,
    resources: Resources | None = None,
    faults: Faults | None = None,
    cluster: Cluster | None = None,
    tags: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
    keep: Collection[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunSummary:
    """Finish `jobs`, all of one part, and say what became of them.

    `trainable` is `module:function`, importable on the workers, with the signature of `trainables.trial.run`. A job's
    configuration is `base` with its own (or its drawn) fields over it. Jobs without a configuration are drawn from
    `space` as `search` says; their names are the trial numbers 0000, 0001, ... of their cell.

    Finished trials of the part that are neither in `jobs` nor in `keep` belong to an earlier plan: they are dropped, so
    that none of them is ever selected. None keeps them all.

    A fixed job that failed is trained again by the next call. A drawn one is not: its failure is Optuna's result,
    unless the worker process was lost too often, which says nothing about the parameters.

    Raises InputError when another process works on the experiment or one trial asks for more than this machine has, and
    KeyboardInterrupt after SIGINT or SIGTERM; every open run is then closed as KILLED.
    """
    (part,) = {job.part for job in jobs}
    assert len({job.trial for job in jobs}) == len(jobs), "two jobs of one name"
    resources, cluster = resources or Resources(), cluster or Cluster()
    recipe = Recipe(
        experiment=experiment, trainable=trainable, model=model, base=base, space=space, search=search,
        selection=selection, tags=tags or {}, threads=resources.threads, home=home, faults=faults or Faults(),
    )  # fmt: skip
    log = home.absolute() / "logs" / f"{experiment}-ray.log"
    with _exclusive(home, experiment), contextlib.ExitStack() as opened:
        tracker = tracking.open_part(
            home=home, uri=tracking_uri, experiment=experiment, part=part, tags=recipe.tags, metric=selection[0]
        )
        ledger = PartLedger(
            recipe=recipe,
            jobs=jobs,
            keep=tracker.runs if keep is None else keep,
            tracker=tracker,
            storage=lambda: _storage(search, home, experiment, opened),
            warm=lambda cells: _warm(recipe, home, cells),
            owner=hashlib.sha256((tracking_uri or tracking.default_uri(home)).encode()).hexdigest()[:16],
            on_progress=on_progress,
        )
        ledger.show()
        status = tracking.KILLED
        try:
            if ledger.todo and not ledger.exhausted():
                from study.engine.launch import launch

                tracker.start_part()
                name = f"{experiment}-{part.replace(':', '-')}"
                launch(ledger.todo, ledger, name=name, home=home, log=log, cluster=cluster, resources=resources)
            if ledger.complete:
                status = tracking.FINISHED
        finally:
            tracker.end_part(status)
    if not ledger.complete:
        raise KeyboardInterrupt
    return RunSummary(
        planned=len(jobs), ran=ledger.ran, superseded=ledger.superseded, failures=ledger.failures,
        stopped=ledger.stopped, log=log,
    )  # fmt: skip


def _storage(search: SearchSpec | None, home: Path, experiment: str, opened: contextlib.ExitStack) -> BaseStorage:
    if search is not None and search.storage is not None:
        storage = open_database(search.storage, "search.storage")
        opened.callback(close_storage, storage)
        return storage
    return open_journal(home / "optuna" / f"{experiment}.log")


def _warm(recipe: Recipe, home: Path, cells: Sequence[str]) -> Mapping[str, Sequence[FrozenTrial]]:
    assert recipe.search is not None
    assert recipe.search.warm_start is not None
    assert recipe.space is not None
    directions = [direction for _, direction in recipe.objectives]
    return warm_trials(recipe.search.warm_start, home=home, cells=cells, space=recipe.space, directions=directions)


def at_work(home: Path, experiment: str) -> str | None:
    """Number of the process that is running jobs of the experiment in this home folder; None: there is none."""
    try:
        with (home / f"{experiment}.lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except FileNotFoundError:
        return None
    return None


def refuse_second(home: Path, experiment: str) -> None:
    """Raise InputError when another process runs jobs of the experiment in this home folder."""
    if owner := at_work(home, experiment):
        raise InputError(f"study '{experiment}': process {owner} works on it in {home}; wait for it or stop it")


@contextlib.contextmanager
def _exclusive(home: Path, experiment: str) -> Iterator[None]:
    """Hold the experiment for this process; the kernel lets go of it when the process ends, however it ends."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{experiment}.lock"
    with path.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                refuse_second(home, experiment)  # else it was a look at the lock, or it has ended at this moment
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
