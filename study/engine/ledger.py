"""The ledger of a part: what the running Tuner reports becomes entries in MLflow and in Optuna, in this order.

`study.engine.reconcile` says why the order matters, and what is done about a driver that dies between the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from study.engine.budget import BudgetMeter
from study.engine.checkpoints import checkpoint_path
from study.engine.fingerprint import checkpoint_identity
from study.engine.optuna_study import Key, Studies, objectives
from study.engine.reconcile import NEW_SEEDS, Decision
from study.specs import BASELINE, Job, Objective, Recipe
from study.tracking.runs import EpochReport, PartTracker


@dataclass(frozen=True, kw_only=True)
class CellProgress:
    """Progress of one row in one cell, in trials."""

    planned: int = 0
    ended: int = 0
    """Failed ones and earlier calls included."""
    failed: int = 0
    running: int = 0
    best: float | None = None
    """Best value of the selection metric so far; None before a trial is finished."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a part, in trials; sent whenever one starts or ends."""

    total: int
    """Planned trials."""
    done: int
    """Ended trials, failed ones and earlier calls included."""
    failed: int
    running: int
    cells: Mapping[Key, CellProgress]
    """(row, name of the cell) -> its part of these."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial without a result."""

    trial: str
    reason: str
    """One line: type and message of the exception."""


@dataclass(kw_only=True)
class _Running:
    """Reports of a trial in progress that `close` will enter."""

    final: EpochReport | None = None
    error: tuple[str, str] | None = None
    """Reason and traceback."""
    pruned_at: int | None = None
    """Epoch that it was stopped after."""


class Ledger:
    """Enters what becomes of each job; the searcher and the scheduler of the Tuner report to it."""

    def __init__(
        self, recipe: Recipe, jobs: Sequence[Job], decision: Decision, *, fingerprints: Mapping[str, str],
        tracker: PartTracker, studies: Studies, on_progress: Callable[[Progress], None] | None = None,
    ) -> None:  # fmt: skip
        self._recipe = recipe
        self._decision = decision
        self._fingerprints = fingerprints
        self._tracker = tracker
        self._studies = studies
        self._on_progress = on_progress
        self._running: dict[str, _Running] = {}
        self._waiting = {job.trial: job for job in decision.todo}
        self._losses: Counter[str] = Counter()
        self._failures = dict(decision.failures)
        self._meter = _meter(recipe, studies)
        self._cells = _cells(recipe, jobs, decision)
        self.ran = 0
        """Jobs that this call started."""

    @property
    def complete(self) -> bool:
        """Whether every job has ended, but for those that a spent budget has kept from starting."""
        return not self._running and all(self.exhausted(job.row) for job in self._waiting.values())

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All jobs that failed, in this call or before."""
        return tuple(Failure(trial=trial, reason=reason) for trial, reason in sorted(self._failures.items()))

    @property
    def stopped(self) -> str | None:
        """Why jobs were not started: the budgets that are spent."""
        rows = dict.fromkeys(job.row for job in self._waiting.values())
        reasons = dict.fromkeys(self._meter.stopped[row] for row in rows if row in self._meter.stopped)
        return "; ".join(reasons) or None

    def exhausted(self, row: str) -> bool:
        """Whether no further job of the row may start."""
        return self._meter.exhausted(row)

    def start(self, job: Job) -> dict[str, Any]:
        """Open the job in MLflow, drawn from Optuna where it has no configuration; returns what its worker needs."""
        recipe, row, study = self._recipe, self._recipe.rows[job.row], self._studies.of_job(job)
        self._meter.start(job.trial, job.row)
        del self._waiting[job.trial]
        self._running[job.trial] = _Running()
        self.ran += 1
        fields = study.ask(int(job.name)) if study is not None else job.config
        config = {**row.base, **(fields or {})}
        fingerprint = self._fingerprints[job.trial]
        document = _document(recipe, job, config)
        self._tracker.start(job, config=config, document=document, fingerprint=fingerprint)
        self._count(job, running=1)
        return {
            "trainable": row.trainable,
            "model": row.model,
            "config": config,
            "task_dir": str(Path(job.task_dir).absolute()),  # Ray runs a trial in a folder of its own
            "seeds": job.seeds,
            "test_dir": None if job.test_dir is None else str(Path(job.test_dir).absolute()),
            "rows": job.config is not None,  # comparisons are made between sweep points and variants, not draws
            "metrics": [objective.metric for objective in self._objectives(job)],
            "threads": recipe.resources.threads,
            "device": "cuda" if recipe.resources.gpus > 0 and row.model != BASELINE else "cpu",
            "gpus": recipe.resources.gpus,
            "checkpoint": {
                "path": str(self._checkpoint(job)),
                "identity": checkpoint_identity(recipe, job, fingerprint, config),
                "seconds": recipe.faults.checkpoint_seconds,
            },
        }

    def report(self, job: Job, epochs: Sequence[EpochReport]) -> bool:
        """Take epochs of a running job; returns whether it is to be stopped.

        Each epoch is judged by itself and in order, so how many came in one message changes nothing; what came after the
        one that stops the trial is dropped, its result included.
        """
        running, study, search = self._running[job.trial], self._studies.of_job(job), self._recipe.rows[job.row].search
        if study is not None and search is not None and search.pruner is not None:
            for position, epoch in enumerate(epochs):
                value = epoch.metrics.get(self._recipe.selection.metric)
                if value is not None and not epoch.final and study.report(int(job.name), epoch.epoch, value):
                    running.pruned_at = epoch.epoch
                    epochs = epochs[: position + 1]
                    break
        self._tracker.report(job.trial, epochs)
        for epoch in epochs:
            if epoch.final:
                running.final = epoch
        return running.pruned_at is not None

    def failed(self, job: Job, *, reason: str, detail: str) -> None:
        """Note that the training raised; `close` follows."""
        self._running[job.trial].error = reason, detail

    def close(self, job: Job) -> None:
        """Enter the end of a trial, after its last report.

        Without a result or an error it was stopped with the Tuner: it stays open, and is closed with the part.
        """
        running, study, search = self._running[job.trial], self._studies.of_job(job), self._recipe.rows[job.row].search
        if running.pruned_at is not None:
            assert study is not None
            assert search is not None
            self._tracker.prune(job.trial, reason=f"after epoch {running.pruned_at} by {search.pruner}")
            study.prune(int(job.name))
            self._end(job)
        elif running.error is not None:
            reason, detail = running.error
            self._tracker.fail(job.trial, failure="trial", reason=reason, detail=detail)
            if study is not None:
                study.fail(int(job.name))
            self._end(job, failure=reason)
        elif running.final is not None:
            self._tracker.finish(job.trial, running.final)
            if job.trial in self._decision.replaced:
                self._tracker.supersede(self._decision.replaced[job.trial], NEW_SEEDS)
            if study is not None:
                study.complete(int(job.name), running.final.metrics, len(job.seeds))
            self._end(job, value=running.final.metrics[self._recipe.selection.metric])

    def lost(self, job: Job, *, reason: str, detail: str) -> bool:
        """Enter that the trial's process went. Optuna does not learn it: that says nothing about the parameters.

        True: the job is to be started again. False: its process went too often, and the next call tries again.
        """
        self._losses[job.trial] += 1
        if self._losses[job.trial] > self._recipe.faults.max_failures:
            self._tracker.fail(job.trial, failure="worker", reason=reason, detail=detail)
            self._end(job, failure=reason)
            return False
        self._tracker.lost(job.trial, number=self._losses[job.trial], reason=reason)
        self._stop_clock(job)
        self._waiting[job.trial] = job
        self.ran -= 1  # it has not run, should the budget be spent before it starts again
        self._count(job, running=-1)
        return True

    def _end(self, job: Job, *, failure: str | None = None, value: float | None = None) -> None:
        self._stop_clock(job)
        self._checkpoint(job).unlink(missing_ok=True)
        if failure is not None:
            self._failures[job.trial] = failure
        self._count(job, running=-1, ended=1, failed=0 if failure is None else 1, value=value)

    def _stop_clock(self, job: Job) -> None:
        del self._running[job.trial]
        spent, study = self._meter.end(job.trial), self._studies.of_job(job)
        if study is not None:
            study.spend(spent)

    def _objectives(self, job: Job) -> Sequence[Objective]:
        search, selection = self._recipe.rows[job.row].search, self._recipe.selection
        if job.config is None and search is not None:
            return objectives(search, selection)
        return (Objective(metric=selection.metric, direction=selection.direction),)

    def _checkpoint(self, job: Job) -> Path:
        return checkpoint_path(self._recipe.home, self._recipe.experiment, job.trial)

    def _count(
        self, job: Job, *, running: int, ended: int = 0, failed: int = 0, value: float | None = None
    ) -> None:  # fmt: skip
        """Bring the progress of the job's row and cell forward, and send it."""
        key = job.row, job.cell.name
        cell = self._cells[key]
        best = [number for number in (cell.best, value) if number is not None]
        self._cells[key] = replace(
            cell, running=cell.running + running, ended=cell.ended + ended, failed=cell.failed + failed,
            best=self._recipe.selection.best(best) if best else None,
        )  # fmt: skip
        self.send_progress()

    def send_progress(self) -> None:
        """Send the progress to whoever draws it."""
        if self._on_progress is not None:
            cells = self._cells.values()
            self._on_progress(
                Progress(
                    total=sum(cell.planned for cell in cells), done=sum(cell.ended for cell in cells),
                    failed=sum(cell.failed for cell in cells), running=sum(cell.running for cell in cells),
                    cells=dict(self._cells),
                )
            )  # fmt: skip


def _meter(recipe: Recipe, studies: Studies) -> BudgetMeter:
    """Go on from what the studies say was spent."""
    budgets = {name: row.search.budget for name, row in recipe.rows.items() if row.search is not None}
    clock = studies.clock_elsewhere
    trials: dict[str, float] = {}
    for (row, _), study in studies.cells.items():
        spent = study.spent
        clock += spent.clock
        trials[row] = trials.get(row, 0.0) + spent.trials
    return BudgetMeter(budgets, clock=clock, trials=trials)


def _cells(recipe: Recipe, jobs: Sequence[Job], decision: Decision) -> dict[Key, CellProgress]:
    """Return the progress that earlier calls have made."""
    left = {job.trial for job in decision.todo}
    cells: dict[Key, CellProgress] = {}
    for job in jobs:
        cell = cells.get((job.row, job.cell.name), CellProgress())
        best = [number for number in (cell.best, decision.values.get(job.trial)) if number is not None]
        cells[job.row, job.cell.name] = replace(
            cell, planned=cell.planned + 1, ended=cell.ended + (job.trial not in left),
            failed=cell.failed + (job.trial in decision.failures),
            best=recipe.selection.best(best) if best else None,
        )  # fmt: skip
    return cells


def _document(recipe: Recipe, job: Job, config: Mapping[str, Any]) -> dict[str, Any]:
    """The trial's `config.yaml`: all that training it again needs."""
    row = recipe.rows[job.row]
    return {
        "model": row.model,
        "trainable": row.trainable,
        "experiment": recipe.experiment,
        "part": job.part,
        "cell": {"source": job.cell.source, "target": job.cell.target, "ratio": job.cell.ratio},
        "row": job.row,
        "name": job.name,
        "seeds": list(job.seeds),
        "feature_set": job.feature_set,
        "task_dir": job.task_dir,
        "test_dir": job.test_dir,
        "config": dict(config),
    }
