"""What is left of a part, and what becomes of each trial: the one place where Optuna and MLflow are kept equal.

A trial is closed in MLflow first and told to Optuna second. A driver that dies in between leaves MLflow ahead, and the
next one tells Optuna what MLflow says. A trial that neither store holds as ended is trained again with the parameters
that it had.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from search_spaces import Space
from study.engine.checkpoints import checkpoint_path
from study.engine.optuna_study import CellSearch
from study.specs import Budget, Direction, Faults, Job, SearchSpec, trial_name
from study.tracking.runs import FAILED, FINISHED, EpochReport, PartTracker, TrialRun


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a part is; sent whenever a trial starts or ends."""

    total: int
    """Planned trials."""
    done: int
    """Those that ended, failed ones and earlier calls included."""
    failed: int
    running: Mapping[str, int]
    """Cell -> trials in progress."""
    best: Mapping[str, float]
    """Cell -> best value of the selection metric so far; cells without a finished trial are absent."""
    cells: Mapping[str, tuple[int, int, int]]
    """Cell -> trials planned, ended (earlier calls and failed ones included), failed."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial without a result."""

    trial: str
    reason: str
    """One line: type and message of the exception."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all trials of a part share."""

    experiment: str
    trainable: str
    """`module:function` with the signature of `trainables.trial.run`."""
    model: str
    base: Mapping[str, Any]
    """Configuration under each job's own fields."""
    space: Space | None
    search: SearchSpec | None
    selection: tuple[str, Direction]
    tags: Mapping[str, str]
    """On every run; `study.data_key` and `study.feature_key` also tell whether an old result still counts."""
    threads: int
    """torch threads of a trial."""
    home: Path
    """Folder of the checkpoints; workers can write there."""
    faults: Faults

    @property
    def objectives(self) -> list[tuple[str, Direction]]:
        """Metrics that are optimised, and which way: those of the search, else the selection metric."""
        own = [(objective.metric, objective.direction) for objective in self.search.objectives] if self.search else []
        return own or [self.selection]


class PartLedger:
    """The jobs of one part between the two stores; told by the searcher what happens to each."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        jobs: Sequence[Job],
        keep: Collection[str],
        tracker: PartTracker,
        storage: Callable[[], BaseStorage],
        warm: Callable[[Sequence[str]], Mapping[str, Sequence[FrozenTrial]]],
        owner: str,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._recipe = recipe
        self._tracker = tracker
        self._metric, self._direction = recipe.selection
        self._objectives = recipe.objectives
        self._on_progress = on_progress
        self._total = len(jobs)
        self._planned = Counter(job.cell.name for job in jobs)
        self._running: Counter[str] = Counter()
        self._best: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._finals: dict[str, EpochReport] = {}
        self._errors: dict[str, tuple[str, str]] = {}
        self._losses: Counter[str] = Counter()
        self._pruned: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._clock: float | None = None
        self.stopped: str | None = None
        """Why no further trial starts, when the budget is spent."""
        self._searches = self._open_searches(jobs, storage, warm, owner)
        for trial in sorted(set(tracker.runs) - set(keep) - {job.trial for job in jobs}):
            while trial in tracker.runs:
                tracker.drop(trial, "the plan has no such trial any more")
            self._checkpoint(trial).unlink(missing_ok=True)
        self.todo = tuple(job for job in jobs if self._is_left(job))
        """Jobs that have to be trained now, in the order given."""
        self._open = {job.trial for job in self.todo}
        self._left = Counter(job.cell.name for job in self.todo)

    @property
    def complete(self) -> bool:
        """Whether every job of `todo` has ended; of those that were started, when the budget is spent."""
        return not (self._open if self.stopped is None else self._open & set(self._started))

    @property
    def ran(self) -> int:
        """Jobs that this call started."""
        return len(self._started)

    @property
    def superseded(self) -> int:
        """Runs that the plan does not ask for, or no longer in this form, and that were dropped."""
        return self._tracker.dropped

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All planned trials that failed, in this call or before."""
        return tuple(Failure(trial=trial, reason=reason) for trial, reason in sorted(self._failures.items()))

    def _open_searches(
        self,
        jobs: Sequence[Job],
        storage: Callable[[], BaseStorage],
        warm: Callable[[Sequence[str]], Mapping[str, Sequence[FrozenTrial]]],
        owner: str,
    ) -> dict[str, CellSearch]:
        """One study per cell. In a database, which many plans share, the plan's name is part of its name."""
        drawn: dict[str, list[Job]] = {}
        for job in jobs:
            if job.config is None:
                drawn.setdefault(job.cell.name, []).append(job)
        if not drawn:
            return {}
        space, search = self._recipe.space, self._recipe.search
        assert space is not None, "drawn jobs need a space"
        assert search is not None, "drawn jobs need a search"
        for cell, cell_jobs in drawn.items():
            names = sorted(job.name for job in cell_jobs)
            assert names == [trial_name(number) for number in range(len(names))], f"{cell}: numbers have gaps: {names}"
        known = cache(lambda: warm(list(drawn)))  # read for the first new study, if any is new
        opened = storage()
        return {
            # The name carries the search's identity: another space or sampler starts another study.
            cell: CellSearch(
                storage=opened,
                name=f"{self._recipe.experiment}/" * (search.storage is not None)
                + f"{cell}/{self._fingerprint(cell_jobs[0])[:12]}",
                space=space,
                spec=search,
                directions=[direction for _, direction in self._objectives],
                owner=owner if search.storage is not None else None,
                warm=(lambda cell=cell: known()[cell]) if search.warm_start is not None else None,  # type: ignore[misc]
            )
            for cell, cell_jobs in drawn.items()
        }

    def _fingerprint(self, job: Job) -> str:
        """Hash of all that a job's result depends on, as far as the plan says it; equal for all draws of a search."""
        recipe = self._recipe
        identity: dict[str, Any] = {
            "model": recipe.model,
            "seeds": job.seeds,
            "features": job.features,
            "task": Path(job.task_dir).name,
            "score": job.score,
            "data": [recipe.tags.get("study.data_key"), recipe.tags.get("study.feature_key")],
        }
        if job.config is not None:
            identity["config"] = {**recipe.base, **job.config}
        elif recipe.space is not None and recipe.search is not None:
            identity |= {
                "base": dict(recipe.base),
                "space": recipe.space.definition(),
                "sampler": [recipe.search.sampler, dict(recipe.search.sampler_args), recipe.search.seed],
                "selection": recipe.selection,
            }
            # What a plan does not use is not in its hash: a study that was begun before it existed goes on.
            used = {
                "points": recipe.search.points_to_evaluate,
                "warm_start": recipe.search.warm_start,
                "pruner": [recipe.search.pruner, dict(recipe.search.pruner_args)] if recipe.search.pruner else None,
                "objectives": recipe.search.objectives,
            }
            identity |= {name: value for name, value in used.items() if value}
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _is_left(self, job: Job) -> bool:
        """Whether the job has to be trained; on the way, Optuna is told what only MLflow knows."""
        search = self._searches[job.cell.name] if job.config is None else None
        run = self._run_of(job, search)
        if run is not None and run.status == FINISHED:
            if search is not None:
                self._tell(search, job, run.metrics)
            self._note_value(job, run.metrics[self._metric])
            return False
        if run is not None and search is not None and run.status == FAILED and run.failure == "trial":
            search.tell(int(job.name), None)
            self._failures[job.trial] = run.reason or "unknown"
            return False
        if run is not None and search is not None and run.pruned:
            search.tell(int(job.name), None, pruned=True)
            return False
        return True

    def _run_of(self, job: Job, search: CellSearch | None) -> TrialRun | None:
        """The job's run in MLflow. One that answers another question is dropped.

        One of the same question with other seeds counts, of a fixed job, until its successor is finished: a figure is never
        without the point. Its seeds are trained again with the new ones, for the seeds of a trial may share a generator.
        """
        while (run := self._tracker.runs.get(job.trial)) is not None:
            if run.fingerprint != self._fingerprint(job):
                same = run.seeds and run.fingerprint == self._fingerprint(replace(job, seeds=run.seeds))
                if same and search is None and run.status == FINISHED:
                    self._tracker.replace(job.trial)
                else:
                    why = "the plan asks for another configuration, data or search under this name"
                    self._tracker.drop(job.trial, why)
            elif search is not None and search.state(int(job.name)) is None:
                self._tracker.drop(job.trial, "its Optuna trial is gone")
            else:
                return run
        return None

    def _tell(self, search: CellSearch, job: Job, metrics: Mapping[str, float]) -> None:
        search.replicates(int(job.name), std=metrics.get(f"{self._metric}_std", 0.0), count=len(job.seeds))
        search.tell(int(job.name), [metrics[metric] for metric, _ in self._objectives])

    def exhausted(self) -> bool:
        """Whether the budget of the search is spent, so that no further trial may start."""
        spec, now = self._recipe.search, time.monotonic()
        if spec is None or spec.budget == Budget() or self.stopped is not None:
            return self.stopped is not None
        spent = Counter[str]()
        for search in self._searches.values():
            spent.update(search.spent)
        running = sum(now - begun for trial, begun in self._started.items() if trial in self._open)
        hours = {
            "hours": (spent["wall"] + (0.0 if self._clock is None else now - self._clock)) / 3600,
            "trial_hours": (spent["trials"] + running) / 3600,
        }
        for name, limit in (("hours", spec.budget.hours), ("trial_hours", spec.budget.trial_hours)):
            if limit is not None and hours[name] >= limit:
                self.stopped = f"search.budget.{name}: {hours[name]:.3g} of {limit:g} are spent"
        return self.stopped is not None

    def _spend(self, job: Job) -> None:
        """Note what an ended trial cost, and how long the search has been going on."""
        if self._searches:
            now = time.monotonic()
            self._searches[job.cell.name].spend(trials=now - self._started[job.trial])
            next(iter(self._searches.values())).spend(wall=now - (self._clock or now))
            self._clock = now

    def start(self, job: Job) -> dict[str, Any]:
        """Open the job in MLflow, drawn from Optuna where it has no configuration; returns what its worker needs."""
        recipe = self._recipe
        self._started[job.trial] = time.monotonic()
        self._clock = self._clock or self._started[job.trial]
        own = self._searches[job.cell.name].draw(int(job.name)) if job.config is None else job.config
        config = {**recipe.base, **own}
        logged = {
            "model": recipe.model,
            "trainable": recipe.trainable,
            "experiment": recipe.experiment,
            "part": job.part,
            "cell": {"source": job.cell.source, "target": job.cell.target, "ratio": job.cell.ratio},
            "name": job.name,
            "seeds": list(job.seeds),
            "features": job.features,
            "task_dir": job.task_dir,
            "test_dir": job.test_dir,
            "config": config,
        }
        self._tracker.start(job, config=config, logged=logged, fingerprint=self._fingerprint(job))
        self._running[job.cell.name] += 1
        self.show()
        return {
            "trainable": recipe.trainable,
            "model": recipe.model,
            "config": config,
            "task_dir": str(Path(job.task_dir).absolute()),  # Ray runs a trial in a folder of its own
            "seeds": job.seeds,
            "test_dir": None if job.test_dir is None else str(Path(job.test_dir).absolute()),
            "rows": job.config is not None,  # comparisons are made between sweep points and variants, not draws
            "metrics": [metric for metric, _ in self._objectives],
            "threads": recipe.threads,
            "checkpoint": {
                "path": str(self._checkpoint(job.trial)),
                "identity": self._identity(job, config),
                "seconds": recipe.faults.checkpoint_seconds,
            },
        }

    def _checkpoint(self, trial: str) -> Path:
        return checkpoint_path(self._recipe.home, self._recipe.experiment, trial)

    def _identity(self, job: Job, config: Mapping[str, Any]) -> str:
        """Hash of all that a checkpoint depends on; other code may keep another state, so its version is in it."""
        code = [self._recipe.tags.get("study.commit"), self._recipe.tags.get("study.versions")]
        text = json.dumps([self._fingerprint(job), config, self._recipe.trainable, code], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def report(self, job: Job, epochs: Sequence[EpochReport]) -> bool:
        """Epochs of a running job; whether it is to be stopped.

        Each epoch is judged by itself and in order, so how many came in one message changes nothing; what came after the
        one that stops the trial is dropped, its result included.
        """
        if self._recipe.search is not None and self._recipe.search.pruner is not None and job.config is None:
            search = self._searches[job.cell.name]
            for position, epoch in enumerate(epochs):
                value = epoch.metrics.get(self._metric)
                if value is not None and not epoch.final and search.report(int(job.name), epoch.epoch, value):
                    self._pruned[job.trial] = epoch.epoch
                    epochs = epochs[: position + 1]
                    break
        self._tracker.report(job.trial, epochs)
        for epoch in epochs:
            if epoch.final:
                self._finals[job.trial] = epoch
        return job.trial in self._pruned

    def failed(self, job: Job, *, reason: str, detail: str) -> None:
        """The training raised; `close` follows."""
        self._errors[job.trial] = (reason, detail)

    def close(self, job: Job) -> None:
        """The trial has ended after its last report. Without a result or an error it was stopped, and stays open."""
        search = self._searches[job.cell.name] if job.config is None else None
        if job.trial in self._pruned:
            self._errors.pop(job.trial, None)
            epoch = self._pruned.pop(job.trial)
            self._tracker.prune(job.trial, reason=f"after epoch {epoch} by {self._recipe.search.pruner}")  # type: ignore[union-attr]
            self._searches[job.cell.name].tell(int(job.name), None, pruned=True)
        elif job.trial in self._errors:
            reason, detail = self._errors.pop(job.trial)
            self._tracker.fail(job.trial, failure="trial", reason=reason, detail=detail)
            if search is not None:
                search.tell(int(job.name), None)
            self._failures[job.trial] = reason
        elif job.trial in self._finals:
            final = self._finals.pop(job.trial)
            self._tracker.finish(job.trial, final)
            if search is not None:
                self._tell(search, job, final.metrics)
            self._note_value(job, final.metrics[self._metric])
        else:
            return
        self._ended(job)

    def lost(self, job: Job, *, reason: str, detail: str) -> bool:
        """The process went. Optuna is not told: that says nothing about the parameters.

        True: the job is to be started again. False: it went too often, and the next call tries again.
        """
        self._losses[job.trial] += 1
        if self._losses[job.trial] <= self._recipe.faults.max_failures:
            self._tracker.lost(job.trial, number=self._losses[job.trial], reason=reason)
            self._spend(job)
            del self._started[job.trial]  # it is left, should the budget be spent before it starts again
            self._running[job.cell.name] -= 1
            self.show()
            return True
        self._tracker.fail(job.trial, failure="worker", reason=reason, detail=detail)
        self._failures[job.trial] = reason
        self._ended(job)
        return False

    def _ended(self, job: Job) -> None:
        self._spend(job)
        self._checkpoint(job.trial).unlink(missing_ok=True)
        self._open.discard(job.trial)
        self._left[job.cell.name] -= 1
        self._running[job.cell.name] -= 1
        self.show()

    def _note_value(self, job: Job, value: float) -> None:
        better = min if self._direction == "minimize" else max
        self._best[job.cell.name] = better(value, self._best.get(job.cell.name, value))

    def show(self) -> None:
        """Send the progress to whoever draws it."""
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    total=self._total,
                    done=self._total - len(self._open),
                    failed=len(self._failures),
                    running={cell: count for cell, count in self._running.items() if count},
                    best=dict(self._best),
                    cells=self._cells(),
                )
            )

    def _cells(self) -> dict[str, tuple[int, int, int]]:
        failed = Counter(trial.split("/")[1] for trial in self._failures)
        return {cell: (count, count - self._left[cell], failed[cell]) for cell, count in self._planned.items()}
