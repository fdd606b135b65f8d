"""Ray Tune's searcher, scheduler and callbacks: they hand out the jobs of a part, and report to the ledger.

All rows and cells run side by side. Nothing here decides about the stores (the ledger does) or must survive: a new driver
makes a new searcher from what Optuna and MLflow hold.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune import Callback
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from study.specs import Job
from study.tracking.runs import EpochReport

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

_TUNE_KEYS = {"trial_id", "done", "training_iteration", "node_ip", "pid"}  # of a result, for Tune's own use
_REASON_LENGTH = 300  # characters of Ray's message in a tag; the artifact has all of it
_Key = tuple[str, str]  # row, name of the cell


class Ledger(Protocol):
    """Takes what becomes of each job; see `study.engine.ledger.Ledger`."""

    def start(self, job: Job) -> dict[str, Any]:
        """Open the job in the stores; returns what its worker needs."""

    def report(self, job: Job, epochs: Sequence[EpochReport]) -> bool:
        """Take epochs of a running job; returns whether to stop it."""

    def exhausted(self, row: str) -> bool:
        """Whether no further job of the row may start."""

    def failed(self, job: Job, *, reason: str, detail: str) -> None:
        """Note that the training raised."""

    def lost(self, job: Job, *, reason: str, detail: str) -> bool:
        """Enter that the worker process went; returns whether to hand the job out again."""

    def close(self, job: Job) -> None:
        """Enter the end of a trial, after its last report."""


def _key(job: Job) -> _Key:
    return job.row, job.cell.name


def _pair(job: Job) -> _Key:
    return job.row, job.cell.pair


class JobSearcher(Searcher):
    """Hands out `todo`: the row and cell with the fewest running trials first, within it in the given order.

    So no cell waits for another's last trial, and up to one trial per row and cell at a time each search is sequential,
    hence reproducible. Running trials of the opposite direction count too: where one training serves both, what it has
    trained is there when the other begins, as long as other rows wait. A row whose budget is spent hands out no more; the
    others go on.
    """

    def __init__(self, todo: Sequence[Job], ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._queues: dict[_Key, deque[Job]] = {}
        for job in todo:
            self._queues.setdefault(_key(job), deque()).append(job)
        self._handed: Counter[_Key] = Counter()
        self._running: Counter[_Key] = Counter()  # by row and pair of domains
        self._jobs: dict[str, Job] = {}
        self.broken: Exception | None = None
        """Error of the ledger at the end of a trial; Tune would count it as the trial's own and go on."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray takes a word too
        """Answer Tune's question for another trial; with Ray's word FINISHED when there is none."""
        going = {row for row, _ in self._queues if not self._ledger.exhausted(row)}
        waiting = [key for key, queue in self._queues.items() if queue and key[0] in going]
        running = any(count for (row, _), count in self._running.items() if row in going)
        if self.broken is not None or not (waiting or running):
            return str(self.FINISHED)
        if not waiting:
            return None  # one that is running may come back
        key = min(waiting, key=lambda key: (self._running[_pair(self._queues[key][0])], self._handed[key]))
        job = self._queues[key].popleft()
        self._handed[key] += 1
        self._running[_pair(job)] += 1
        self._jobs[trial_id] = job
        return {"payload": self._ledger.start(job)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take Tune's notice that a trial ended; its result has arrived before, through `JobScheduler`."""
        job = self._jobs[trial_id]
        self._running[_pair(job)] -= 1
        if not error:
            try:
                self._ledger.close(job)
            except Exception as broken:
                self.broken = broken
                raise

    def again(self, job: Job) -> None:
        """Hand the job out once more, before the others of its row and cell."""
        self._queues[_key(job)].appendleft(job)

    def job(self, trial_id: str) -> Job:
        """Return the job behind a Tune trial."""
        return self._jobs[trial_id]

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: Ray's snapshot is not what a study resumes from."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher into the snapshot, see `save`


class JobScheduler(FIFOScheduler):
    """Passes reports to the ledger and stops the trials that it gives up. A worker waits for the answer in between."""

    def __init__(self, searcher: JobSearcher, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._searcher = searcher
        self._ledger = ledger

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Take a message of `study.engine.worker`.

        The notice that a trial is over repeats the last one without its contents.
        """
        if "epochs" not in result:
            return str(self.CONTINUE)
        job = self._searcher.job(trial.trial_id)
        # Tune flattens what its schedulers see.
        run_tags = {key.removeprefix("tags/"): text for key, text in result.items() if key.startswith("tags/")}
        stop = self._ledger.report(
            job,
            [
                EpochReport(
                    epoch=epoch, metrics=metrics, final=final, artifacts=artifacts, time_ms=time_ms, tags=run_tags
                )
                for epoch, metrics, final, artifacts, time_ms in result["epochs"]
            ],
        )
        failure = {key.removeprefix("failure/"): text for key, text in result.items() if key.startswith("failure/")}
        if failure:
            if full := failure.pop("full"):
                self._searcher.broken = OSError(f"trial {job.trial}: {full}; make room, the same command goes on")
                raise self._searcher.broken
            self._ledger.failed(job, **failure)
        return str(self.STOP if stop else self.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # pickled into Tune's snapshot, see JobSearcher.save


class JobCallback(Callback):
    """Passes lost workers to the ledger."""

    def __init__(self, searcher: JobSearcher, ledger: Ledger) -> None:
        self._searcher = searcher
        self._ledger = ledger

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Take the message out of the result, so that Tune neither logs nor keeps it; `JobScheduler` has read it.

        Of the rest too, Tune would keep several windows for each number, of each trial until the end of the part.
        """
        for name in result.keys() - _TUNE_KEYS:
            del result[name]

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Report that the trial's process or node is gone."""
        if self._searcher.broken is not None:
            return
        # "Failure # 1 (occurred at ...)", then Ray's message: what happened, a line of identifiers each, and advice.
        detail = Path(trial.error_file).read_text(encoding="utf-8")
        reason = "worker lost: " + " ".join(detail.partition("\n")[2].split())[:_REASON_LENGTH]
        job = self._searcher.job(trial.trial_id)
        if self._ledger.lost(job, reason=reason, detail=detail):
            self._searcher.again(job)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # pickled into Tune's snapshot, see JobSearcher.save


class SilentCallback(TrialProgressCallback):
    """Takes the place of Tune's own, which prints a line per finished trial whatever its verbosity."""

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        """Print nothing."""

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, *args: Any, **info: Any) -> None:
        """Print nothing."""
