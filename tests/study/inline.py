"""The search side of the engine in this process, without Ray and MLflow: trials one after the other, in milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from optuna.storages import BaseStorage
from ray.tune.utils.util import flatten_dict

from search_spaces import Space
from study.engine.ray_tune import JobScheduler, JobSearcher
from study.engine.reconcile import PartLedger, Recipe
from study.engine.worker import Outbox, run_trial
from study.specs import Cell, Faults, Job, SearchSpec, trial_name
from study.tracking.runs import FAILED, FINISHED, KILLED, RUNNING, EpochReport, TrialRun

sys.path.insert(0, str(Path(__file__).parent / "fakes"))
import analytic

__all__ = ["CELL", "MemoryTracker", "analytic", "search"]

CELL = Cell(source="books", target="movies", ratio=0.2)


@dataclass
class MemoryTracker:
    """In the place of `PartTracker`: what MLflow would hold."""

    runs: dict[str, TrialRun] = field(default_factory=dict)
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: dict[str, list[int]] = field(default_factory=dict)
    dropped: int = 0

    def start(self, job: Job, *, config: Mapping[str, Any], logged: Mapping[str, Any], fingerprint: str) -> None:
        self.configs[job.trial] = config
        self.epochs[job.trial] = []
        self._put(job.trial, RUNNING, fingerprint=fingerprint)

    def report(self, trial: str, reports: Sequence[EpochReport]) -> None:
        self.epochs[trial] += [report.epoch for report in reports if not report.final]

    def finish(self, trial: str, final: EpochReport) -> None:
        self._put(trial, FINISHED, metrics=final.metrics)

    def fail(self, trial: str, *, failure: str, reason: str, detail: str) -> None:
        self._put(trial, FAILED, failure=failure, reason=reason)

    def prune(self, trial: str, *, reason: str) -> None:
        self._put(trial, KILLED, pruned=True, reason=reason)

    def drop(self, trial: str, why: str) -> None:
        del self.runs[trial]
        self.dropped += 1

    def _put(self, trial: str, status: str, **fields: Any) -> None:
        given = {
            "fingerprint": "",
            "failure": None,
            "reason": None,
            "metrics": {},
            "pruned": False,
            "run_id": trial,
            "seeds": (),
            "spent": 0.0,
        }
        if trial in self.runs:
            given["fingerprint"] = self.runs[trial].fingerprint
        self.runs[trial] = TrialRun(trial=trial, status=status, **{**given, **fields})


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
    trainable: str = "analytic:run",
    batch: int = 1,
    trials: int | None = None,
    die_at: tuple[int, int] | None = None,
    folder: Path,
) -> PartLedger:
    """Run what is left of a search. `die_at` (trial of this call, message of it): the driver ends right after that."""
    jobs = [
        Job(
            part="search", cell=CELL, name=trial_name(number), config=None, seeds=spec.seeds, features="m",
            task_dir=str(folder),
        )
        for number in range(trials or spec.trials)
    ]  # fmt: skip
    recipe = Recipe(
        experiment="study", trainable=trainable, model="fake", base=base, space=space, search=spec,
        selection=("val_rmse", "minimize"), tags={}, threads=1,
        home=folder, faults=Faults(),
    )  # fmt: skip
    ledger = PartLedger(
        recipe=recipe, jobs=jobs, keep=(), tracker=tracker, storage=lambda: storage, warm=lambda cells: {},  # type: ignore[arg-type]
        owner="here", on_progress=None,
    )  # fmt: skip
    searcher = JobSearcher(ledger.todo, ledger)
    scheduler = JobScheduler(searcher, ledger)
    for number in range(len(jobs) + 1):
        asked = searcher.suggest(f"t{number}")
        if not isinstance(asked, dict):
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
                run_trial(asked["payload"], outbox)
            except Exception as error:
                outbox.fail(error)
            outbox.send()
        except StoppedError:
            pass
        except KeyboardInterrupt:
            return ledger
        searcher.on_trial_complete(f"t{number}", result={})
    raise AssertionError("more trials than jobs")
