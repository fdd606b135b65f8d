"""The search side of the engine in this process, without Ray and MLflow: trials one after the other, in milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from optuna.storages import BaseStorage
from ray.tune.utils.util import flatten_dict

from search_spaces import Space
from study.engine.fingerprint import fingerprints, study_name
from study.engine.ledger import Ledger
from study.engine.optuna_study import Studies, open_study
from study.engine.ray_tune import JobScheduler, JobSearcher
from study.engine.reconcile import carry_out, decide
from study.engine.worker import Outbox, run_trial
from study.specs import Cell, Job, Recipe, RowRecipe, SearchSpec, trial_name
from study.tracking.runs import FAILED, FINISHED, KILLED, RUNNING, EpochReport, TrialRun, param_text
from trainables.interface import Selection

sys.path.insert(0, str(Path(__file__).parent / "fakes"))
import analytic

__all__ = ["CELL", "KEY", "MemoryTracker", "analytic", "search"]

CELL = Cell(source="books", target="movies", ratio=0.2)
KEY = ("subject", CELL.name)


@dataclass
class MemoryTracker:
    """In the place of `PartTracker`: what MLflow would hold, one run per trial."""

    runs: dict[str, list[TrialRun]] = field(default_factory=dict)
    epochs: dict[str, list[int]] = field(default_factory=dict)

    def run(self, number: int, row: str = "subject") -> TrialRun:
        """The run of a search trial."""
        (run,) = self.runs[f"search/{CELL.name}/{row}/{number:04d}"]
        return run

    @property
    def all_runs(self) -> list[TrialRun]:
        """All of them, by trial."""
        return [run for trial in sorted(self.runs) for run in self.runs[trial]]

    def resume(self, run: TrialRun) -> None:
        """Go on in the run that is there."""

    def start(self, job: Job, *, config: Mapping[str, Any], document: Mapping[str, Any], fingerprint: str) -> None:
        self.epochs[job.trial] = []
        params = {name: param_text(value) for name, value in config.items()}
        run = TrialRun(
            run_id=job.trial, trial=job.trial, status=RUNNING, fingerprint=fingerprint, seeds=job.seeds, params=params
        )
        self.runs[job.trial] = [run]

    def report(self, trial: str, reports: Sequence[EpochReport]) -> None:
        self.epochs[trial] += [report.epoch for report in reports if not report.final]

    def finish(self, trial: str, final: EpochReport) -> None:
        self._change(trial, status=FINISHED, metrics=final.metrics)

    def fail(self, trial: str, *, failure: str, reason: str, detail: str) -> None:
        self._change(trial, status=FAILED, failure=failure, reason=reason)

    def prune(self, trial: str, *, reason: str) -> None:
        self._change(trial, status=KILLED, pruned=True, reason=reason)

    def _change(self, trial: str, **fields: Any) -> None:
        self.runs[trial] = [replace(self.runs[trial][0], **fields)]


class Batches(Outbox):
    """Sends after so many epochs instead of after a while."""

    def __init__(self, send: Any, size: int) -> None:
        super().__init__(send)
        self.size = size

    def add(self, epoch: Any) -> None:
        self._epochs.append(epoch)
        if len(self._epochs) >= self.size:
            self.send()


class StoppedError(BaseException):
    """Ray ends a worker's thread by SystemExit."""


def search(
    *,
    storage: BaseStorage,
    tracker: MemoryTracker,
    space: Space,
    spec: SearchSpec,
    base: Mapping[str, Any],
    folder: Path,
    rows: Mapping[str, SearchSpec] | None = None,
    trainable: str = "analytic:run",
    batch: int = 1,
    trials: int | None = None,
    die_at: tuple[int, int] | None = None,
) -> Ledger:
    """Run what is left of a search of `rows` (default: one, by `spec`) in one cell.

    `die_at` (trial of this call, message of it): the driver ends right after that.
    """
    specs = rows or {"subject": spec}
    jobs = [
        Job(
            part="search", cell=CELL, row=row, model="fake", name=trial_name(number), config=None, seeds=row_spec.seeds,
            feature_set="main", task_dir=str(folder),
        )
        for row, row_spec in specs.items()
        for number in range(trials or row_spec.trials)
    ]  # fmt: skip
    recipe = Recipe(
        experiment="study", home=folder, selection=Selection("val_rmse", "minimize"),
        rows={
            row: RowRecipe(trainable=trainable, model="fake", base=base, space=space, search=row_spec)
            for row, row_spec in specs.items()
        },
    )  # fmt: skip
    hashes = fingerprints(recipe, jobs)
    firsts = {job.row: job for job in reversed(jobs)}
    studies = Studies({
        (row, CELL.name): open_study(
            storage, study_name(recipe, job, hashes[job.trial]), space=space, search=specs[row], selection=recipe.selection
        )
        for row, job in firsts.items()
    })  # fmt: skip
    drawn = {key: study.trials() for key, study in studies.cells.items()}
    decision = decide(recipe, jobs, hashes, runs=tracker.runs, drawn=drawn)
    carry_out(decision, tracker, studies)  # type: ignore[arg-type]
    ledger = Ledger(recipe, jobs, decision, fingerprints=hashes, tracker=tracker, studies=studies)  # type: ignore[arg-type]
    searcher = JobSearcher(decision.todo, ledger)
    scheduler = JobScheduler(searcher, ledger)
    for number in range(len(jobs) + 1):
        answer = searcher.suggest(f"t{number}")
        if not isinstance(answer, dict):
            return ledger
        sent = 0

        def send(message: dict[str, Any], number: int = number) -> None:
            nonlocal sent
            sent += 1
            trial: Any = SimpleNamespace(trial_id=f"t{number}")
            if scheduler.on_trial_result(None, trial, flatten_dict(message)) == scheduler.STOP:
                raise StoppedError
            if die_at == (number, sent):
                raise KeyboardInterrupt

        outbox = Batches(send, batch)
        try:
            try:
                run_trial(answer["payload"], outbox)
            except Exception as error:
                outbox.fail(error)
            outbox.send()
        except StoppedError:
            pass
        except KeyboardInterrupt:
            return ledger
        searcher.on_trial_complete(f"t{number}", result={})
    raise AssertionError("more trials than jobs")
