"""MLflow: one experiment per plan, one parent run per part, one run per trial, found by tag and never duplicated.

A run is closed truthfully whatever happens: FINISHED, FAILED with its reason, or KILLED when the driver went before the
trial ended. What a dead driver left RUNNING is settled when the next one opens the part. A run is never deleted: one that
the plan does not ask for any more gets the tag `study.superseded`, and loses it when the plan asks for it again. Metrics
are sent in batches: a call per metric costs ten times more than the training of a small epoch.
"""

from __future__ import annotations

import logging
import shlex
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from features.errors import InputError, one_line
from study.home import Home
from study.specs import Job
from study.tracking import tags
from study.tracking.addresses import is_database, is_server, naming, without_password
from study.tracking.local_store import LOCK_S, check_store, database_file, making
from study.tracking.local_store import default_uri as default_uri
from study.tracking.spool import ANSWER_S, Spool, answers

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

FINISHED, FAILED, KILLED, RUNNING = "FINISHED", "FAILED", "KILLED", "RUNNING"
CONFIG_FILE = "config.yaml"
ERROR_FILE = "error.txt"
# A run in progress shows its epochs at most this late, in seconds.
_FLUSH_S = 5.0
# How long the end of a part waits for a server that is away; a driver that was told to stop waits less.
PATIENCE_S, LAST_WORDS_S = 600.0, 10.0
# MLflow's limits: entries of one batch, characters of a tag and of a parameter.
_BATCH, _TAG_LENGTH, _PARAM_LENGTH = 1000, 5000, 6000


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """An epoch of a trial, as it travels from the worker to the driver."""

    epoch: int
    """Counted from 1 by convention of the trainables; the step of the `epoch/...` series."""
    metrics: Mapping[str, float]
    final: bool
    """The last report, whose metrics are the trial's result."""
    artifacts: Mapping[str, str | bytes]
    """File name -> content, logged with the final report."""
    time_ms: int
    """Wall clock of the worker, milliseconds since 1970."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags that the process which trained knows best, for it may have another machine than the driver; final only."""


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A trial's run as it stands in MLflow."""

    run_id: str
    trial: str
    status: str
    fingerprint: str = ""
    """Hash of everything that the result depends on; another one means that the run answers another question."""
    superseded: str | None = None
    """Why the plan does not ask for it any more; None: it counts."""
    failure: str | None = None
    """`trial`: the training raised or gave NaN; `worker`: its process went; None: it did not fail."""
    reason: str | None = None
    """One line, when it failed."""
    pruned: bool = False
    """Stopped early by the search's pruner; such a run is KILLED and has no result."""
    spent: float = 0.0
    """Seconds that earlier attempts without a result took."""
    seeds: tuple[int, ...] = ()
    """Training seeds."""
    params: Mapping[str, str] = field(default_factory=dict)
    """As logged, see `param_text`; empty where a driver died before it logged them."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    """Tags that pick it out among the trials of its search."""


@dataclass(kw_only=True)
class _Open:
    """A run that this process writes to."""

    run_id: str
    logged_epoch: int
    """Last epoch that was taken, also from an earlier attempt that was interrupted; none is logged a second time."""
    pending: list[EpochReport] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    """Seconds of earlier attempts."""


def connect(uri: str) -> MlflowClient:
    """Make a client; a new SQLite store gets its tables here, which takes seconds.

    Raises InputError where a server does not answer, or a SQLite store cannot be used.
    """
    if is_server(uri) and not answers(uri):
        raise InputError(f"MLflow at {without_password(uri)}: does not answer; start the server, or name another store")
    if is_database(uri):
        _check_database(uri)
    if (database := database_file(uri)) is not None:
        check_store(database)
        with making(database) as new:
            client = _client(uri)
            if new:
                client.search_experiments(max_results=1)  # with the first question, the tables are made
        return client
    return _client(uri)


def _check_database(uri: str) -> None:
    """Raise InputError where a database does not answer, which MLflow would ask again and again for minutes."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with create_engine(uri, connect_args={"connect_timeout": int(ANSWER_S)}).connect():
            pass
    except ImportError as error:
        raise InputError(
            f"MLflow at {without_password(uri)}: needs the Python package {error.name}; install it"
        ) from error
    except (SQLAlchemyError, OSError) as error:
        reason = one_line(getattr(error, "orig", None) or error, 200)
        raise InputError(
            f"MLflow at {without_password(uri)}: cannot be used ({reason}); start the database or correct its address"
        ) from error


def _client(uri: str) -> MlflowClient:
    with warnings.catch_warnings():
        # mlflow 3.17 with SQLAlchemy 2.1: a deprecation inside MLflow's own models, at import.
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if (database := database_file(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            _wait_for_locks()
        return MlflowClient(tracking_uri=uri)


@cache
def _wait_for_locks() -> None:
    """Let this process wait for a SQLite file that another one writes to; by itself SQLite gives up after 5 s."""
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def wait(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute(f"PRAGMA busy_timeout = {LOCK_S * 1000:.0f}")


def open_experiment(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """Return the experiment's id, created when absent; `artifacts` is the folder for a new one (None: the server's own)."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None if artifacts is None else artifacts.absolute().as_uri()
        # The kind opens the UI on runs and not on traces.
        kind = {tags.EXPERIMENT_KIND: "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    refuse_deleted(experiment)
    return str(experiment.experiment_id)


def refuse_deleted(experiment: Experiment) -> None:
    """Raise InputError for an experiment that somebody has deleted in MLflow: its runs look as if there were none."""
    if experiment.lifecycle_stage != "active":
        raise InputError(
            f"experiment '{experiment.name}': is deleted in MLflow; restore it there or give the plan another name"
        )


def find_runs(
    client: MlflowClient, experiment_id: str, part: str | None = None, *, superseded: bool = False
) -> Iterator[Run]:
    """Yield the active runs of the experiment or of one part, newest first; superseded ones only where asked for."""
    # Part names hold no quotes (study.specs checks them), so the filter cannot be broken out of.
    filter_string = f"tags.`{tags.PART}` = '{part}'" if part else ""
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string, max_results=_BATCH, page_token=token)
        yield from (run for run in page if superseded or tags.SUPERSEDED not in run.data.tags)
        token = page.token
        if not token:
            return


def open_part(
    *, home: Path, uri: str | None, experiment: str, part: str, run_tags: Mapping[str, str], metric: str
) -> PartTracker:
    """Open the runs of a part in the store at `uri`, by default a SQLite file in `home` with the artifacts beside it.

    `run_tags`: on every run that is made. `metric`: where a run has logged it, its result is there.
    """
    places = Home(home)
    # A run is found by what is at the store, so what an earlier driver could not send goes first.
    spool = Spool(_client(uri), uri, places.spool(experiment)) if uri and is_server(uri) else None
    try:
        client = connect(uri or default_uri(home))
        if uri and spool is not None and not spool.drain(PATIENCE_S):
            raise InputError(
                f"MLflow at {without_password(uri)}: went away again; {spool.waiting} writes are kept; the same command "
                "goes on"
            )
        experiment_id = open_experiment(client, experiment, places.artifacts if uri is None else None)
        tracker = PartTracker(
            client=client, experiment_id=experiment_id, part=part, run_tags=run_tags, metric=metric, home=home, uri=uri,
            spool=spool,
        )  # fmt: skip
        tracker.load()
    except BaseException:
        if spool is not None:
            spool.stop()
        raise
    return tracker


class PartTracker:
    """The runs of one part: its parent run and its trials."""

    def __init__(
        self, *, client: MlflowClient, experiment_id: str, part: str, run_tags: Mapping[str, str], metric: str,
        home: Path | None = None, uri: str | None = None, spool: Spool | None = None,
    ) -> None:  # fmt: skip
        self._client = client
        self._spool = spool
        self._write: Any = spool or client
        self._experiment_id = experiment_id
        self._part = part
        self._tags = dict(run_tags)
        self._metric = metric
        self._store = naming(uri)
        self._home = f" --home {shlex.quote(str(home))}" if home else ""
        self._open: dict[str, _Open] = {}
        self._parent: str | None = None
        self._parent_status = KILLED
        self._resumed: dict[str, tuple[TrialRun, int]] = {}  # trial -> the run that goes on, and its last epoch
        self.runs: dict[str, list[TrialRun]] = {}
        """Trial -> its runs as they stood at `load`, newest first, superseded ones included."""
        self.superseded = 0
        """Runs that got the tag."""

    def load(self) -> None:
        """Read all runs of the part; closes those that a dead driver left open."""
        for run in find_runs(self._client, self._experiment_id, self._part, superseded=True):
            if tags.TRIAL in run.data.tags:
                self.runs.setdefault(run.data.tags[tags.TRIAL], []).append(self._settle(run))
            else:
                self._parent, self._parent_status = run.info.run_id, run.info.status

    def _settle(self, run: Run) -> TrialRun:
        """Close what a dead driver left open. With the final metrics in place, only the closing itself was missing."""
        status = run.info.status
        if status == RUNNING:
            status = FINISHED if self._metric in run.data.metrics else KILLED
            self._write.set_terminated(run.info.run_id, status)
        return _trial_run(run, status)

    def start_part(self) -> None:
        """Open (or continue) the parent run."""
        if self._parent is None:
            run_tags = _texts({**self._tags, tags.PART: self._part})
            run = self._write.create_run(self._experiment_id, run_name=self._part, tags=run_tags)
            self._parent = run.info.run_id
        else:
            self._write.update_run(self._parent, status=RUNNING)
        self._parent_status = RUNNING

    def end_part(self, status: str) -> None:
        """Close the parent run, and as KILLED every trial that is still open."""
        for trial in list(self._open):
            self._close(trial, KILLED)
        if self._parent is not None and self._parent_status != status:
            self._write.set_terminated(self._parent, status)
        if self._spool is not None and not self._spool.close(PATIENCE_S if status == FINISHED else LAST_WORDS_S):
            raise InputError(
                f"MLflow: the server is away; {self._spool.waiting} writes are kept in the home folder and nothing is "
                "lost; the same command sends them once it is back"
            )

    def stop(self) -> None:
        """Send no more to a server, whatever has kept the part from its end."""
        if self._spool is not None:
            self._spool.stop()

    def supersede(self, run: TrialRun, why: str) -> None:
        """Tag a run that the plan does not ask for any more: nothing counts, selects or shows it from now on."""
        self._write.set_tag(run.run_id, tags.SUPERSEDED, why)
        for mark in run.marks:
            self._write.delete_tag(run.run_id, mark)
        self.superseded += 1

    def restore(self, run: TrialRun) -> None:
        """Take the tag off a run that the plan asks for again."""
        self._write.delete_tag(run.run_id, tags.SUPERSEDED)

    def resume(self, run: TrialRun) -> None:
        """Let the next `start` of its trial go on in this run."""
        self._resumed[run.trial] = run, self._last_epoch(run)  # read now, for the server may be away later

    def start(self, job: Job, *, config: Mapping[str, Any], document: Mapping[str, Any], fingerprint: str) -> None:
        """Open a run for the job, or go on in the one that `resume` named.

        `config` becomes parameters; `document` is the whole of `config.yaml`, all that training again needs.
        """
        if job.trial in self._open:
            return  # its process went, and another one goes on
        if job.trial in self._resumed:
            run, last_epoch = self._resumed.pop(job.trial)
            self._write.update_run(run.run_id, status=RUNNING)
            for tag in (tags.ERROR, tags.FAILURE) if run.failure is not None else ():
                self._write.delete_tag(run.run_id, tag)
            self._open[job.trial] = _Open(run_id=run.run_id, logged_epoch=last_epoch, spent=run.spent)
            if run.params:
                return
        else:
            assert self._parent is not None, "start_part comes first"
            run_tags = {**self._tags, **_job_tags(job), tags.FINGERPRINT: fingerprint, tags.PARENT: self._parent}
            run_name = f"{job.cell.name} {job.part} {job.row} {job.name}"  # the UI cuts long names at the end
            created = self._write.create_run(self._experiment_id, run_name=run_name, tags=_texts(run_tags))
            self._open[job.trial] = _Open(run_id=created.info.run_id, logged_epoch=-1)
        run_id = self._open[job.trial].run_id
        self._write.log_text(run_id, yaml.safe_dump(dict(document), sort_keys=False), CONFIG_FILE)
        command = f"{self._store}study rerun {run_id}{self._home}"
        # Parameters go last: where they are, the rest is too.
        self._log(run_id, params=_params(job, config), run_tags={tags.COMMAND: command})

    def _last_epoch(self, run: TrialRun) -> int:
        series = [key for key in run.metrics if key.startswith("epoch/")]
        steps = (entry.step for key in series[:1] for entry in self._client.get_metric_history(run.run_id, key))
        return max(steps, default=-1)

    def report(self, trial: str, reports: Sequence[EpochReport]) -> None:
        """Take epochs of a running trial; they are sent every few seconds."""
        open_ = self._open[trial]
        for report in reports:
            if report.epoch > open_.logged_epoch and not report.final:
                open_.pending.append(report)
                open_.logged_epoch = report.epoch
        if time.monotonic() - open_.flushed >= _FLUSH_S:
            self._flush(open_)

    def finish(self, trial: str, final: EpochReport) -> None:
        """Log the result and close the run as FINISHED.

        The metrics go last, in one batch: where they are, everything else is too, and a driver that is killed right
        after them leaves a run that only needs closing.
        """
        open_ = self._open[trial]
        self._flush(open_)
        for name, content in final.artifacts.items():
            self._artifact(open_.run_id, name, content)
        self._log(open_.run_id, run_tags=final.tags)
        self._log(open_.run_id, metrics=list(_metrics(final, prefix="", step=0)))
        self._close(trial, FINISHED)

    def lost(self, trial: str, *, number: int, reason: str) -> None:
        """Note that the trial's process went for the `number`th time; the run stays open, for another process goes on."""
        self._log(self._open[trial].run_id, run_tags={tags.RESTARTS: f"{number}, {reason}"})

    def fail(self, trial: str, *, failure: str, reason: str, detail: str) -> None:
        """Close the run as FAILED, with a one-line reason as a tag and the traceback as an artifact."""
        open_ = self._open[trial]
        self._log(open_.run_id, run_tags={tags.ERROR: reason, tags.FAILURE: failure})
        self._write.log_text(open_.run_id, detail, ERROR_FILE)
        self._close(trial, FAILED)

    def prune(self, trial: str, *, reason: str) -> None:
        """Close the run as KILLED, with the tag `study.pruned`: the search gave it up, and it never counts as a result."""
        self._log(self._open[trial].run_id, run_tags={tags.PRUNED: reason})
        self._close(trial, KILLED)

    def _close(self, trial: str, status: str) -> None:
        open_ = self._open[trial]
        self._flush(open_)
        if status != FINISHED:  # then its metric `seconds` says what it took
            self._log(open_.run_id, run_tags={tags.SPENT: f"{open_.spent + time.monotonic() - open_.began:.3f}"})
        self._write.set_terminated(open_.run_id, status)
        del self._open[trial]

    def _flush(self, open_: _Open) -> None:
        reports, open_.pending = open_.pending, []
        open_.flushed = time.monotonic()
        self._log(
            open_.run_id,
            metrics=[metric for report in reports for metric in _metrics(report, prefix="epoch/", step=report.epoch)],
        )

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        run_tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if params or run_tags:
            self._write.log_batch(
                run_id,
                params=[Param(key, value) for key, value in (params or {}).items()],
                tags=[RunTag(key, value) for key, value in _texts(run_tags or {}).items()],
            )
        for start in range(0, len(metrics), _BATCH):
            self._write.log_batch(run_id, metrics=[Metric(*metric) for metric in metrics[start : start + _BATCH]])

    def _artifact(self, run_id: str, name: str, content: str | bytes) -> None:
        if isinstance(content, str):
            self._write.log_text(run_id, content, name)
            return
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self._write.log_artifact(run_id, str(path))


def param_text(value: Any) -> str:
    """Return a value of a config as MLflow keeps it in a parameter."""
    return str(value)[:_PARAM_LENGTH]


def _trial_run(run: Run, status: str) -> TrialRun:
    run_tags, params = run.data.tags, run.data.params
    return TrialRun(
        run_id=run.info.run_id,
        trial=run_tags[tags.TRIAL],
        status=status,
        fingerprint=run_tags.get(tags.FINGERPRINT, ""),
        superseded=run_tags.get(tags.SUPERSEDED),
        failure=run_tags.get(tags.FAILURE),
        reason=run_tags.get(tags.ERROR),
        pruned=tags.PRUNED in run_tags,
        spent=float(run_tags.get(tags.SPENT, 0.0)),
        seeds=tuple(map(int, params["seeds"].split(","))) if "seeds" in params else (),
        params=params,
        metrics=run.data.metrics,
        marks=tuple(tag for tag in (tags.BEST, tags.PARETO, tags.PLACE) if tag in run_tags),
    )


def _job_tags(job: Job) -> dict[str, str]:
    job_tags = {
        tags.PART: job.part,
        tags.TRIAL: job.trial,
        tags.CELL: job.cell.name,
        tags.TASK: job.cell.task,
        tags.RATIO: f"{job.cell.ratio:g}",
        tags.ROW: job.row,
        tags.MODEL: job.model,
        tags.PRESET: job.preset,
    }
    if job.part.startswith("sweep:"):
        job_tags[tags.VARIANT] = job.name.partition("=")[2] or job.name
    elif job.part == "ablate":
        job_tags[tags.VARIANT] = job.name
    return job_tags


def _params(job: Job, config: Mapping[str, Any]) -> dict[str, str]:
    identity = {
        "row": job.row,
        "model": job.model,
        "task": job.cell.task,
        "source": job.cell.source,
        "target": job.cell.target,
        "ratio": f"{job.cell.ratio:g}",
        "seeds": ",".join(map(str, job.seeds)),
        "feature_set": job.feature_set,
    }
    return {key: param_text(value) for key, value in {**config, **identity}.items()}


def _texts(run_tags: Mapping[str, str]) -> dict[str, str]:
    return {key: str(value)[:_TAG_LENGTH] for key, value in run_tags.items()}


def _metrics(report: EpochReport, *, prefix: str, step: int) -> Iterable[tuple[str, float, int, int]]:
    return ((prefix + key, value, report.time_ms, step) for key, value in report.metrics.items())
