"""Runs the jobs of one part: exactly those that are not finished yet, whatever ended the driver before.

What is durable is Optuna's journal and MLflow. Every call reads from them what is left and gives that to a fresh Tuner;
Ray's own snapshots are never resumed from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from features.errors import InputError
from study.engine.fingerprint import fingerprints
from study.engine.ledger import CellProgress, Failure, Ledger, Progress
from study.engine.optuna_study import open_studies
from study.engine.reconcile import carry_out, decide
from study.home import Home, process_at
from study.specs import Job, Recipe
from study.tracking import runs as tracking
from trainables.trial import LEFT

__all__ = ["CellProgress", "Failure", "Progress", "RunSummary", "at_work", "refuse_second", "run_jobs"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Outcome of a call of `run_jobs`, in trials."""

    planned: int
    ran: int
    """Trials that this call trained; 0: there was nothing left to do."""
    superseded: int
    """Runs that the plan does not ask for any more: tagged in this call, and kept for when it does again."""
    failures: tuple[Failure, ...]
    """All planned trials that failed, in this call or before."""
    stopped: str | None
    """Why trials of the plan were not started: the budgets that are spent."""


def run_jobs(
    recipe: Recipe, jobs: Sequence[Job], on_progress: Callable[[Progress], None] | None = None
) -> RunSummary:  # fmt: skip
    """Finish `jobs`, all of one part, of any rows of the recipe, and say what became of them.

    A job's configuration is its row's base with its own fields over it. Jobs without a configuration are drawn from their
    row's space as its search says; their names are the trial numbers 0000, 0001, ... of their row and cell. Jobs of all
    rows share one launch, so that no row waits for another's last trial.

    Trials of the part that the recipe's `planned` does not have are superseded: kept, but never selected. Those that it has
    and `jobs` has not are left as they are.

    A fixed job that failed is trained again by the next call. A drawn one is not: its failure is Optuna's result,
    unless the worker process was lost too often, which says nothing about the parameters.

    Raises InputError when another process works on the experiment or one trial asks for more than this machine has, and
    KeyboardInterrupt after SIGINT or SIGTERM; every open run is then closed as KILLED.
    """
    (part,) = {job.part for job in jobs}
    assert len({job.trial for job in jobs}) == len(jobs), "two jobs of one name"
    home = Home(recipe.home)
    with _exclusive(home, recipe.experiment), contextlib.ExitStack() as resources:
        hashes = fingerprints(recipe, jobs)
        tracker = tracking.open_part(
            home=recipe.home, uri=recipe.tracking_uri, experiment=recipe.experiment, part=part, run_tags=recipe.tags,
            metric=recipe.selection.metric,
        )  # fmt: skip
        resources.callback(tracker.stop)
        studies = open_studies(recipe, jobs, hashes, owner=_owner(recipe), resources=resources)
        drawn = {key: study.trials() for key, study in studies.cells.items()}
        decision = decide(recipe, jobs, hashes, runs=tracker.runs, drawn=drawn)
        carry_out(decision, tracker, studies)
        ledger = Ledger(
            recipe, jobs, decision, fingerprints=hashes, tracker=tracker, studies=studies, on_progress=on_progress
        )
        ledger.send_progress()
        status, left = tracking.KILLED, home.tasks / LEFT
        shutil.rmtree(left, ignore_errors=True)  # of a driver that was killed, perhaps by other code
        try:
            if not ledger.complete:
                from study.engine.launch import launch

                tracker.start_part()
                launch(recipe, decision.todo, ledger, name=f"{recipe.experiment}-{part.replace(':', '-')}")
            if ledger.complete:
                status = tracking.FINISHED
        finally:
            tracker.end_part(status)
            shutil.rmtree(left, ignore_errors=True)
    if status != tracking.FINISHED:
        raise KeyboardInterrupt
    return RunSummary(
        planned=len(jobs), ran=ledger.ran, superseded=tracker.superseded, failures=ledger.failures,
        stopped=ledger.stopped,
    )  # fmt: skip


def _owner(recipe: Recipe) -> str:
    """Tell home folders and MLflow stores apart, in a database that several share."""
    store = recipe.tracking_uri or tracking.default_uri(recipe.home)
    return hashlib.sha256(store.encode()).hexdigest()[:16]


def at_work(home: Home, experiment: str) -> str | None:
    """Return the number of the process that is running jobs of the experiment in this home folder; None: there is none."""
    return process_at(home.lock(experiment))


def refuse_second(home: Home, experiment: str) -> None:
    """Raise InputError when another process runs jobs of the experiment in this home folder."""
    if owner := at_work(home, experiment):
        raise InputError(f"study '{experiment}': process {owner} works on it in {home}; wait for it or stop it")


@contextlib.contextmanager
def _exclusive(home: Home, experiment: str) -> Iterator[None]:
    """Hold the experiment for this process; the kernel lets go of it when the process ends, however it ends."""
    home.path.mkdir(parents=True, exist_ok=True)
    with home.lock(experiment).open("a+", encoding="utf-8") as file:
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
